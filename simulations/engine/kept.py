"""What the clients of a block keep between rounds: personal layers, and the memory of a client algorithm.

It is read, used and written where the block is trained, in a worker process if there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType
from numpy.typing import NDArray
from torch import Tensor, nn

from corymb.client.algorithms.algorithm import Memory, inside
from corymb.client.algorithms.memory_files import folder_of, keep, recall
from corymb.client.app import client_identity, make_seeded, round_of
from corymb.client.local_work import PERSONAL, algorithm_of
from corymb.protocol.records import of_kind, resumable_rounds
from corymb.protocol.shared_state import personal_names
from corymb.protocol.train_settings import TrainSettings
from corymb.simulations.data.clients import Client
from corymb.simulations.data.population import Population
from corymb.simulations.engine.block_result import BlockResult
from corymb.simulations.engine.blocks import Task, Trainer
from corymb.simulations.engine.coordinates import Coordinates, Vectors, Whole, is_over_examples, written_out
from corymb.strategies import Layout
from corymb.strategies.core.layout import Role


@dataclass(frozen=True)
class Kept:
    """What clients with `settings` keep, one folder each in `folders`.

    The run may be resumed after the rounds `resumable`.
    `personal` are the entries that stay at the client, with their values in a new module.
    """

    settings: TrainSettings
    personal: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    resumable: tuple[int, ...] = ()

    @property
    def has_own_starts(self) -> bool:
        """Whether each client starts from its own model."""
        return bool(self.personal)

    def for_clients(self, contexts: Sequence[Context]) -> Kept:
        """Return this with the folders of the clients with these `contexts`."""
        return replace(self, folders=tuple(folder_of(each, client_identity(each)) for each in contexts))

    def shared_layout(self, layout: Layout) -> Layout:
        """Return the layout of the entries that travel; `layout` is that of all entries which are trained."""
        if not self.personal:
            return layout
        entries = [entry for entry in layout.entries if entry.name not in self.personal]
        zeros = {entry.name: torch.zeros(entry.shape, dtype=entry.dtype) for entry in entries}
        return Layout.of(zeros, [entry.name for entry in entries if entry.role is Role.BUFFER])

    def shared_columns(self, layout: Layout) -> Tensor | slice:
        """Return the positions of the shared parameters in a vector of `layout`."""
        if not self.personal:
            return slice(None)
        spans = [torch.arange(e.start, e.stop) for e in layout.parameters if e.name not in self.personal]
        return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)

    def train(
        self, task: Task, trainer: Trainer, layout: Layout, parameters: Mapping[str, Tensor], second: Tensor | None
    ) -> BlockResult:
        """Train the clients of `task` from `parameters` and what they kept, and keep what they keep after it.

        `second` is the rule's second vector, `[P]`, if it has one.
        """
        algorithm = algorithm_of(self.settings)
        if not algorithm.remembers and not self.personal:
            return replace(task, kept=None).train(trainer, layout, parameters)
        memories = [recall(folder, task.server_round - 1) for folder in self.folders]
        vectors = self._vectors(memories, task, trainer, layout, parameters, second)
        if isinstance(vectors, Whole):
            memories = [
                written_out(memory, layout, trainer.population, client)
                for client, memory in zip(task.clients, memories, strict=True)
            ]
        stacked = vectors.stacked(memories)
        offset, pull = algorithm.correction(stacked, vectors.second)
        changes: dict[str, Any] = {"kept": None}
        if pull:  # towards the received model, as the proximal term
            changes["settings"] = task.settings.model_copy(update={"proximal": task.settings.proximal + pull})
        if offset is not None or isinstance(vectors, Coordinates):
            changes["offsets"] = vectors.offsets(torch.zeros_like(vectors.start) if offset is None else offset)
        if self.personal:
            changes |= self._own_starts(task, memories, layout, parameters)
        result = replace(task, **changes).train(trainer, layout, parameters)
        remembered: Memory = {}
        if algorithm.remembers:
            path = torch.tensor(result.report.steps, dtype=layout.dtype) * self.settings.rate(task.server_round)
            ends = vectors.ends(result)
            remembered = algorithm.remember(stacked, vectors.second, vectors.start, ends, path[:, None])
        own = self._personal_after(result, layout)
        for row, folder in enumerate(self.folders):
            kept = {**vectors.kept(remembered, row), **{name: each[row] for name, each in own.items()}}
            if kept:
                keep(folder, task.server_round, kept, self.resumable)
        return result

    def _vectors(
        self, memories: Sequence[Memory], task: Task, trainer: Trainer, layout: Layout,
        parameters: Mapping[str, Tensor], second: Tensor | None,
    ) -> Vectors:  # fmt: skip
        """Return coordinates if they are shorter and every client that keeps something keeps them."""
        keeps_gradients = "keeps_gradients" in vars(type(algorithm_of(self.settings)))  # a subclass may not
        first = trainer.first_layer(self.settings) if keeps_gradients and not self.personal else None
        if first is not None and all(is_over_examples(memory) for memory in memories if memory):
            return Coordinates(first, layout, parameters, second, trainer.population, task.clients)
        return Whole(layout, self.shared_columns(layout), parameters, second, len(memories))

    def reports(self, server_round: int, steps: int) -> dict[str, float]:
        """Return the metrics that the rule needs from a client after `steps` steps."""
        return algorithm_of(self.settings).reports(self.settings, server_round, steps)

    def _own_starts(
        self, task: Task, memories: Sequence[Memory], layout: Layout, parameters: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Return the starts `[K, P]` and the buffers `{name: [K, ...]}` of the clients."""
        received = {name: torch.from_numpy(values) for name, values in task.buffers.items()}
        received |= {n: t for n, t in parameters.items() if n not in self.personal}
        new = {name: torch.as_tensor(values) for name, values in self.personal.items()}
        states = [{**new, **received, **inside(PERSONAL, memory)} for memory in memories]
        starts = torch.stack([layout.vector(state) for state in states])
        names = [entry.name for entry in layout.entries if entry.role is not Role.PARAMETER]
        buffers = {name: torch.stack([state[name] for state in states]).numpy() for name in names}
        return {"starts": starts.numpy(), "buffers": buffers}

    def _personal_after(self, result: BlockResult, layout: Layout) -> dict[str, Tensor]:
        """Return the personal entries of all clients, `{name in the memory: [K, ...]}`."""
        if not self.personal:
            return {}
        buffers = {name: torch.from_numpy(values) for name, values in result.report.buffers.items()}
        every = {**layout.split(result.models()), **buffers}
        return {f"{PERSONAL}.{name}": values for name, values in every.items() if name in self.personal}


def with_vectors_in_full(app: Client, population: Population, layout: Layout) -> Client:
    """Return `app`, whose clients train alone, with what they keep written out first if it is in coordinates."""

    def reply(message: Message, context: Context) -> Message:
        if message.metadata.message_type.partition(".")[0] == MessageType.TRAIN:
            configs = of_kind(message.content, ConfigRecord)
            before = round_of(configs) - 1
            folder = folder_of(context, client_identity(context))
            if is_over_examples(memory := recall(folder, before)):
                client = int(context.node_config["partition-id"])
                memory = written_out(memory, layout, population, client)
                keep(folder, before, memory, resumable_rounds(configs))
        return app(message, context)

    return reply


class KeptByClients:
    """Makes a `Kept` for each group of clients; `model` is the factory of the clients' module."""

    def __init__(self, model: Callable[[], nn.Module], layout: Layout) -> None:
        self._model, self._layout = model, layout
        self._modules: dict[int, nn.Module] = {}  # of the last seed

    def of(self, settings: TrainSettings, received: Mapping[str, Tensor], resumable: tuple[int, ...]) -> Kept | None:
        """Return what clients with `settings`, who receive these entries, keep; None if that is nothing.

        The run may be resumed after the rounds `resumable`.
        Raises `ValueError` if other entries are missing than those that stay at the client.
        """
        if not settings.algorithm and not settings.personal:
            return None
        if settings.seed not in self._modules:
            self._modules = {settings.seed: make_seeded(self._model, settings.seed)}
        module = self._modules[settings.seed]
        home, initial = personal_names(module, settings), module.state_dict()
        names = [entry.name for entry in self._layout.entries]
        if {name for name in names if name not in received} != home & set(names):
            raise ValueError("The received model lacks other entries than those that stay at the client.")
        return Kept(settings, {name: initial[name].numpy() for name in names if name in home}, resumable=resumable)
