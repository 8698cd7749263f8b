"""Cut the clients of one push of training messages into blocks, and give access to a trained block as `Rows`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.client import TrainSettings
from corymb.simulations.data.population import Population
from corymb.simulations.engine.block_result import BlockResult
from corymb.strategies import Layout
from corymb.strategies.core.rows import Matrix

MAX_CLIENTS = 32  # per block
MAX_PARAMETERS = 1 << 26  # per block, as if every client's model were written out
MIN_BLOCKS = 4  # minimum number of blocks in a large enough push, so that as many processes have work
MIN_WORK = 1 << 24  # multiplications of forward passes; a block with less work is not worth its overhead
MAX_PADDING = 1.5  # examples of a block including padding, relative to its real examples

Targets = Sequence[tuple[int, Tensor]]  # pairs of a model's number in its block and the vector `[P]` to copy it to


class Trainer(Protocol):
    """Trains one block at a time on a `device`; the vectors and the report of the result are on the CPU."""

    device: torch.device
    population: Population

    def first_layer(self, settings: TrainSettings) -> str | None:
        """Return the name of the first layer if what clients keep of it is best kept as factors; see `Coordinates`."""

    def train(
        self,
        start: dict[str, Tensor],
        clients: Sequence[int],
        settings: TrainSettings,
        server_round: int,
        own_starts: bool = False,
        offsets: Mapping[str, Any] | None = None,
    ) -> BlockResult:
        """See `Program.train`."""


class Keeper(Protocol):
    """What clients keep between rounds; see `kept.Kept`."""

    @property
    def personal(self) -> Mapping[str, NDArray[Any]]:
        """The entries that stay at the client, with their values in a new module."""

    @property
    def has_own_starts(self) -> bool:
        """Whether each client starts from its own model."""

    def train(
        self, task: Task, trainer: Trainer, layout: Layout, parameters: Mapping[str, Tensor], second: Tensor | None
    ) -> BlockResult:
        """Train the clients of `task` from `parameters` and what they kept."""


@dataclass(frozen=True)
class Task:
    """Clients to train as one block, largest first; `requests` are the numbers of their messages in the push.

    `buffers` are the model's buffers at the start. With `starts [K, P]`, each client has its own start, and buffers
    `{name: [K, ...]}`. `offsets` are added to the clients' gradients in each step; see `Program.train`. `kept` is what
    the clients keep between rounds; it gives them their starts and offsets.
    """

    requests: tuple[int, ...]
    clients: tuple[int, ...]
    settings: TrainSettings
    server_round: int
    buffers: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    starts: NDArray[Any] | None = None
    offsets: Mapping[str, Any] | None = None
    kept: Keeper | None = None

    @property
    def has_own_starts(self) -> bool:
        """Whether each client starts from its own model."""
        return self.starts is not None or (self.kept is not None and self.kept.has_own_starts)

    @property
    def nbytes(self) -> int:
        """The bytes of the task's arrays."""
        own = [] if self.starts is None else [self.starts]
        kept = self.kept.personal.values() if self.kept is not None else ()
        return sum(array.nbytes for array in (*own, *self.buffers.values(), *kept))

    def train(
        self, trainer: Trainer, layout: Layout, parameters: Mapping[str, Tensor], second: Tensor | None = None
    ) -> BlockResult:
        """Train the clients with `trainer`, from `parameters` or from their own starts.

        `second [P]` is the second vector that the rule sends, if it sends one.
        """
        if self.kept is not None:
            return self.kept.train(self, trainer, layout, parameters, second)
        own = self.starts is not None
        state = layout.split(torch.from_numpy(self.starts)) if self.starts is not None else parameters
        start = {**state, **{name: torch.tensor(values) for name, values in self.buffers.items()}}
        return trainer.train(start, self.clients, self.settings, self.server_round, own, self.offsets)


def max_clients(parameters: int) -> int:
    """Return the largest number of clients in a block, for a model of `parameters` parameters."""
    return max(1, min(MAX_CLIENTS, MAX_PARAMETERS // parameters))


def cut_into_blocks(
    sizes: Sequence[int], settings: TrainSettings, parameters: int = 1, fewest: int = MIN_BLOCKS, work: int = 0
) -> list[list[int]]:
    """Cut clients into blocks; each block is a list of indices into `sizes`, the number of examples of each client.

    Clients of similar size share a block, so that blocks need little padding. `parameters` is the number of parameters
    of the model, and `work` the multiplications of an example (see `work_of`; at least `parameters`). The result has
    at least `fewest` blocks if there is enough work for them. It depends only on the arguments, so that the same blocks
    are trained by any number of processes.
    """
    limit = max_clients(parameters)
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    examples_seen = [
        settings.steps * settings.batch_size if settings.steps else size * (settings.epochs or 1) for size in sizes
    ]
    worthwhile = max(1, sum(examples_seen) * max(work, parameters) // MIN_WORK)
    number = max(-(-len(order) // limit), min(fewest, len(order), worthwhile))
    clients_each, remainder = divmod(len(order), number)
    starts = {block * clients_each + min(block, remainder) for block in range(number)}  # the larger blocks first
    blocks: list[list[int]] = []
    largest = total = count = 0  # of the last block: its largest client, its examples, its clients
    for position, index in enumerate(order):
        size = sizes[index]
        # With a fixed number of steps all clients do the same work, whatever their sizes.
        is_padded = settings.steps is None and largest * (count + 1) > MAX_PADDING * (total + size)
        if position in starts or is_padded:
            blocks.append([])
            largest, total, count = size, 0, 0
        blocks[-1].append(index)
        total, count = total + size, count + 1
    return blocks


class ClientBlock(ABC):
    """Base class of a block of K clients that writes their models out on demand; see `strategies.core.rows.Rows`."""

    def __init__(self, clients: int, layout: Layout) -> None:
        self.count = clients
        self._layout = layout
        self._models: tuple[Tensor, ...] = ()  # empty until the models are written out

    @abstractmethod
    def _copy_to(self, targets: Targets) -> Callable[[], None]:
        """Write models out; called only while `_models` is empty."""

    def copy_to(self, targets: Targets) -> Callable[[], None]:
        """See `Rows`."""
        if not self._models:
            return self._copy_to(targets)
        copy_rows(self._models, targets)
        return lambda: None

    def pieces(self, row: int) -> tuple[Tensor, ...]:
        """See `Rows`; the first call writes all models of the block out."""
        if not self._models:
            rows = torch.empty(self.count, self._layout.num_parameters, dtype=self._layout.dtype).unbind()
            self._copy_to(list(enumerate(rows)))()
            self._models = rows
        return tuple(self._models[row][entry.start : entry.stop] for entry in self._layout.parameters)


class MatrixBlock(Matrix):
    """A block whose models are the rows of `models [K, P]`, because each client had its own start."""

    def __init__(self, models: Tensor, layout: Layout) -> None:
        super().__init__(models)
        self._layout = layout

    def pieces(self, row: int) -> tuple[Tensor, ...]:
        """See `Rows`."""
        return tuple(self.models[row][entry.start : entry.stop] for entry in self._layout.parameters)


class TrainedBlock(ClientBlock):
    """A block that this process has trained."""

    def __init__(self, result: BlockResult, start: Tensor, layout: Layout) -> None:
        super().__init__(len(result.report.steps), layout)
        self._result, self._start = result, start

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`."""
        update = relative_to_origin(
            self._result.weighted_update(weights.to(self._start.dtype)), weights, self._start, origin
        )

        def finish() -> None:
            total.add_(update)

        return finish

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Rows`."""
        squares = self._result.squared_distances(offset_of(centre, self._start))
        return lambda: squares

    def _copy_to(self, targets: Targets) -> Callable[[], None]:
        copy_rows(self._result.models(), targets)
        return lambda: None


def copy_rows(models: Sequence[Tensor] | Tensor, targets: Targets) -> None:
    """Copy the models `[P]` that `targets` names into its vectors."""
    for number, target in targets:
        target.copy_(models[number])


def offset_of(centre: Tensor, start: Tensor) -> Tensor | None:
    """Return `centre - start` in the dtype of `start`, or None if both are the same vector."""
    return None if is_same(start, centre) else (centre - start).to(start.dtype)


def is_same(start: Tensor, origin: Tensor) -> bool:
    """Return whether both are the same vector; nearly always they share their memory."""
    return start.data_ptr() == origin.data_ptr() or torch.equal(start, origin)


def relative_to_origin(update: Tensor, weights: Tensor, start: Tensor, origin: Tensor) -> Tensor:
    """Convert `sum_k weights[k] * (model_k - start)` into the same sum of differences from `origin`."""
    if is_same(start, origin):
        return update
    return update + (start.double() - origin) * weights.sum()
