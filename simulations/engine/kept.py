"""What the clients of a block keep between rounds: personal layers, and the memory of a client algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from flwr.app import Context
from torch import Tensor, nn

from corymb.client.algorithms.algorithm import Memory, inside
from corymb.client.algorithms.memory_files import folder_of, keep, recall
from corymb.client.app import client_identity, make_seeded
from corymb.client.local_work import PERSONAL, algorithm_of
from corymb.protocol.train_settings import TrainSettings
from corymb.simulations.engine.block_result import Report
from corymb.simulations.engine.blocks import MatrixBlock, Task
from corymb.strategies import Layout
from corymb.strategies.core.layout import Role
from corymb.strategies.core.rows import Rows


@dataclass(frozen=True)
class Kept:
    """What clients with `settings` keep, who receive the entries `received` and the second vector `extra`.

    `initial` is the state of a new module, and `layout` that of all entries which are trained.
    """

    settings: TrainSettings
    server_round: int
    received: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    layout: Layout

    @cached_property
    def shared_layout(self) -> Layout:
        """The layout of the entries that travel."""
        buffers = [entry.name for entry in self.layout.buffers]
        return Layout.of(
            {e.name: self.received[e.name] for e in self.layout.entries if e.name in self.received}, buffers
        )

    @cached_property
    def personal(self) -> list[str]:
        """The names of the entries that stay at the client."""
        return [entry.name for entry in self.layout.entries if entry.name not in self.received]

    @cached_property
    def columns(self) -> Tensor:
        """The positions of the shared parameters in the layout's vector."""
        spans = [torch.arange(e.start, e.stop) for e in self.layout.parameters if e.name in self.received]
        return torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)

    def prepared(self, task: Task, contexts: Sequence[Context]) -> Task:
        """Return `task` with the clients' own starts and the corrections of their gradients."""
        memories = self._memories(contexts)
        offset, pull = algorithm_of(self.settings).correction(self._stacked(memories), self._extra())
        if pull:  # towards the received model, as the proximal term
            pulled = {"proximal": task.settings.proximal + pull}
            task = replace(task, settings=task.settings.model_copy(update=pulled))
        if offset is not None:
            whole = torch.zeros(len(contexts), self.layout.num_parameters, dtype=self.layout.dtype)
            whole[:, self.columns] = offset.to(whole.dtype)
            task = replace(task, offsets=whole.numpy())
        if self.personal:
            states = [{**self.initial, **self.received, **inside(PERSONAL, memory)} for memory in memories]
            starts = torch.stack([self.layout.vector(state) for state in states])
            names = [entry.name for entry in self.layout.entries if entry.role is not Role.PARAMETER]
            buffers = {name: torch.stack([state[name] for state in states]).numpy() for name in names}
            task = replace(task, starts=starts.numpy(), buffers=buffers)
        return task

    def finish(self, rows: Rows, report: Report, contexts: Sequence[Context]) -> tuple[Rows, Layout]:
        """Keep what the clients keep after their training, and return the rows and the layout of what travels."""
        ends = torch.empty(rows.count, self.layout.num_parameters, dtype=self.layout.dtype)
        rows.copy_to(list(enumerate(ends.unbind())))()
        shared = ends[:, self.columns] if self.personal else ends
        rates = torch.tensor(report.steps, dtype=ends.dtype)[:, None] * self.settings.rate(self.server_round)
        start = self.shared_layout.vector(self.received) if self.columns.numel() else torch.zeros(0)
        memories = self._stacked(self._memories(contexts))
        kept = algorithm_of(self.settings).remember(memories, self._extra(), start, shared, rates)
        personal = self.layout.split(ends) if self.personal else {}
        buffers = {name: torch.from_numpy(values) for name, values in report.buffers.items()}
        for row, context in enumerate(contexts):
            own = {name: values[row] for name, values in kept.items()}
            own |= {f"{PERSONAL}.{name}": {**personal, **buffers}[name][row] for name in self.personal}
            if own:
                keep(folder_of(context, client_identity(context)), self.server_round, own)
        return (MatrixBlock(shared, self.shared_layout), self.shared_layout) if self.personal else (rows, self.layout)

    def reports(self, steps: int) -> dict[str, float]:
        """Return the metrics that the rule needs from a client after `steps` steps."""
        return algorithm_of(self.settings).reports(self.settings, self.server_round, steps)

    def _memories(self, contexts: Sequence[Context]) -> list[dict[str, Tensor]]:
        return [recall(folder_of(each, client_identity(each)), self.server_round - 1) for each in contexts]

    def _stacked(self, memories: Sequence[Memory]) -> dict[str, Tensor]:
        """Return the algorithm's vectors of all clients, `[K, P]`; zeros for a client that has none."""
        names = {name for memory in memories for name in memory if not name.startswith(f"{PERSONAL}.")}
        zeros = torch.zeros(self.columns.numel(), dtype=self.layout.dtype)
        return {name: torch.stack([memory.get(name, zeros) for memory in memories]) for name in names}

    def _extra(self) -> Tensor | None:
        return self.shared_layout.vector(self.extra) if self.extra else None


class KeptByClients:
    """Makes a `Kept` for each group of clients; `model` is the factory of the clients' module."""

    def __init__(self, model: Callable[[], nn.Module], layout: Layout) -> None:
        self._model, self._layout = model, layout
        self._initial: dict[int, Mapping[str, Tensor]] = {}

    def of(
        self, settings: TrainSettings, server_round: int, received: Mapping[str, Tensor], extra: Mapping[str, Tensor]
    ) -> Kept | None:
        """Return what clients with `settings` keep; None if that is nothing."""
        if not settings.algorithm and not settings.personal:
            return None
        if settings.seed not in self._initial:
            self._initial = {settings.seed: make_seeded(self._model, settings.seed).state_dict()}
        return Kept(settings, server_round, received, extra, self._initial[settings.seed], self._layout)
