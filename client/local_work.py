"""A client's work on one message: the module, what stays at the client, and the client algorithm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corymb.client.algorithms.algorithm import ClientAlgorithm, Correction, Local, Memory, Term, inside
from corymb.client.algorithms.known import make_algorithm
from corymb.client.algorithms.memory_files import OVER_EXAMPLES, keep, recall
from corymb.client.batches import Batch, augmented, outputs_and_targets
from corymb.client.seeds import derive_seed
from corymb.client.tasks.task import Task
from corymb.client.trainer import precision, train
from corymb.protocol.compression import CompressionSettings
from corymb.protocol.shared_state import PERSONAL_BY_DEFAULT, fixed_names, personal_names
from corymb.protocol.train_settings import TrainSettings
from corymb.strategies import Layout
from corymb.strategies.core.layout import Role
from corymb.strategies.core.registry import import_reference

PERSONAL = "personal"  # prefix of personal entries in a client's memory
RESIDUAL = "residual"  # what compression has left out of the last update


def algorithm_of(settings: TrainSettings) -> ClientAlgorithm:
    """Return the client algorithm of `settings`."""
    return make_algorithm(settings.algorithm, settings.algorithm_options)


def keeps_memory(settings: TrainSettings) -> bool:
    """Return whether a client may keep something between rounds; an algorithm with a `train` of its own may."""
    algorithm, compression = algorithm_of(settings), settings.compression
    has_personal = settings.personal or settings.algorithm in PERSONAL_BY_DEFAULT
    if has_personal or algorithm.remembers or not algorithm.trains_in_blocks:
        return True
    return compression is not None and compression.feeds_back


class Trained(NamedTuple):
    """What travels to the server: metrics, entries of the state, the algorithm's vector, and a compressed update.

    With an update, the entries are those that are no parameters.
    """

    metrics: dict[str, float]
    state: dict[str, Tensor]
    sent: dict[str, Tensor]
    update: dict[str, Tensor]


class LocalWork:
    """The work of one client with `settings` in a round.

    `module` is a new module, `received` the entries that travel, `extra` the rule's second vector by parameter name,
    and `folder` holds what the client keeps, so that the run can be resumed after the rounds `resumable`. Raises
    `ValueError` if the received entries are not those that the settings share.
    """

    def __init__(
        self, module: nn.Module, received: Mapping[str, Tensor], extra: Mapping[str, Tensor], settings: TrainSettings,
        server_round: int, task: Task, new_module: Callable[[], nn.Module], folder: Path, resumable: Collection[int],
    ) -> None:  # fmt: skip
        self._settings, self._round, self._task, self._folder = settings, server_round, task, folder
        self._resumable = resumable
        self._module, self._received, self._extra, self._new_module = module, received, extra, new_module
        self._algorithm = algorithm_of(settings)
        self._personal = personal_names(module, settings)
        self._check(self._personal | fixed_names(module))

    def _check(self, home: Collection[str]) -> None:
        expected = set(self._module.state_dict()) - set(home)
        if missing := expected - self._received.keys():
            raise ValueError(f"The received model lacks {min(missing)!r}; send all that is not personal.")
        if unknown := self._received.keys() - expected:
            reason = "which stays at the client" if min(unknown) in home else "which the client's model does not have"
            raise ValueError(f"The received model has {min(unknown)!r}, {reason}; begin with client.shared_state().")

    def _local(self, server_round: int, fit: Any) -> Local:
        memory = recall(self._folder, server_round) if keeps_memory(self._settings) else {}
        self._module.load_state_dict({**self._module.state_dict(), **self._received, **inside(PERSONAL, memory)})
        start = {name: t.detach().clone() for name, t in self._received.items() if t.is_floating_point()}
        return Local(
            self._module, self._settings, self._round, fit, self._new_module, self._loss, start, memory, self._extra
        )

    def _loss(self, module: nn.Module, batch: Batch) -> Tensor:
        with precision(self._settings, next(module.parameters()).device):
            return self._task.loss(*outputs_and_targets(module, batch))

    def train(
        self, batches: Callable[[TrainSettings], Any], seeded: Callable[[], None], after_step: Callable[[], None]
    ) -> Trained:
        """Train, keep what the algorithm keeps, and return what travels to the server.

        `batches(settings)` draws the batches of the round, the same in every call; `seeded()` seeds torch's generators.
        `after_step` is called after each step of the shared model.
        """
        local = self._local(self._round - 1, self._fit(batches, seeded, after_step))
        if any(OVER_EXAMPLES in name for name in local.memory):
            raise ValueError("What this client keeps is of a simulation, and only that can read it; begin a new run.")
        offset, pull = self._correction(local)
        if offset or pull:
            correction = Correction(offset, pull, local.start)
            metrics = local.fit(local.module, correction)
        else:
            metrics = _checked(self._algorithm.train(local), self._settings.algorithm)
        metrics |= self._algorithm.reports(self._settings, self._round, int(metrics["steps"]))
        state = {name: tensor.detach() for name, tensor in local.module.state_dict().items()}
        kept: dict[str, Tensor] = {}
        if keeps_memory(self._settings):
            kept = {**self._remembered(local, metrics), **local.kept}
            kept |= {f"{PERSONAL}.{name}": state[name] for name in self._personal}
        shared = {name: state[name].cpu().contiguous() for name in self._received}
        update: dict[str, Tensor] = {}
        if self._settings.compression is not None:
            shared, update, left_out = self._compressed(self._settings.compression, shared, local.memory)
            kept |= {RESIDUAL: left_out} if self._settings.compression.feeds_back else {}
        if kept:
            keep(self._folder, self._round, kept, self._resumable)
        return Trained(metrics, shared, local.sent, update)

    def _compressed(
        self, compression: CompressionSettings, shared: dict[str, Tensor], memory: Memory
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return the entries that are not compressed, the tensors of the update, and what these leave out of it."""
        layout = Layout.of(shared, [name for name, _ in self._module.named_buffers()])
        update = layout.vector(shared).float() - layout.vector(self._received).float()
        if compression.feeds_back and RESIDUAL in memory:
            update = update + memory[RESIDUAL]
        generator = torch.Generator().manual_seed(derive_seed(self._settings.seed, self._folder.name, self._round))
        tensors = compression.compress(update, generator)
        rest = {entry.name: shared[entry.name] for entry in layout.entries if entry.role is not Role.PARAMETER}
        return rest, tensors, update - compression.restore(tensors, update.numel())

    def evaluated(self, batches: Callable[[TrainSettings], Any], seeded: Callable[[], None]) -> nn.Module:
        """Return the module that the client evaluates."""
        return self._algorithm.evaluated(self._local(self._round, self._fit(batches, seeded, lambda: None)))

    def _fit(
        self, batches: Callable[[TrainSettings], Any], seeded: Callable[[], None], after_shared: Callable[[], None]
    ) -> Any:
        def fit(
            module: nn.Module, correction: Correction | None = None, term: Term | None = None,
            settings: TrainSettings | None = None, after_step: Callable[[Batch], None] = lambda batch: None,
        ) -> dict[str, float]:  # fmt: skip
            used = settings or self._settings

            def stepped(batch: Batch) -> None:
                after_step(batch)
                if module is self._module:
                    after_shared()

            seeded()
            drawn = batches(used)
            if used.augment:
                drawn = augmented(drawn, import_reference(used.augment, "function train.augment"))
            return train(module, drawn, used, self._task, self._round, stepped, correction, term)

        return fit

    def _correction(self, local: Local) -> tuple[dict[str, Tensor], float]:
        """Return the correction of an algorithm that trains in blocks, by parameter name."""
        if not self._algorithm.trains_in_blocks:
            return {}, 0.0
        offset, pull = self._algorithm.correction(local.memory, self._vector(self._extra))
        return {} if offset is None else self._by_name(offset), pull

    def _remembered(self, local: Local, metrics: Mapping[str, float]) -> Memory:
        if not self._algorithm.trains_in_blocks or not self._received:
            return {}
        start, end = self._vector(local.start), self._vector(dict(local.module.named_parameters()))
        assert start is not None
        assert end is not None
        path = self._settings.rate(self._round) * metrics["steps"]
        return self._algorithm.remember(local.memory, self._vector(self._extra), start, end, path)

    def _shared(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._module.named_parameters() if name in self._received]

    def _vector(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Return the shared parameters in `values` as one vector on the CPU; None if there are no values."""
        if not values:
            return None
        if not self._received:
            return torch.zeros(0)
        return torch.cat([values[name].detach().flatten().float().cpu() for name, _ in self._shared()])

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        shared = self._shared()
        pieces = vector.split([p.numel() for _, p in shared])
        return {name: piece.view_as(p) for (name, p), piece in zip(shared, pieces, strict=True)}


def _checked(metrics: Any, algorithm: str) -> dict[str, float]:
    """Return the `metrics` of a client algorithm. Raises `ValueError` if they are no numbers by name, with "steps"."""
    problem = ""
    if not isinstance(metrics, dict):
        problem = f"returned {'None' if metrics is None else f'a {type(metrics).__name__}'}"
    elif "steps" not in metrics:
        problem = "returned no 'steps', the number of steps"
    elif wrong := [name for name, value in metrics.items() if not isinstance(value, (int, float, list))]:
        problem = f"returned a {type(metrics[wrong[0]]).__name__} as the metric {wrong[0]!r}"
    if problem:
        raise ValueError(f"The method `train` of {algorithm!r} {problem}; return the metrics of local.fit, numbers.")
    found: dict[str, float] = metrics
    return found
