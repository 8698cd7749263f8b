"""A push of training messages, cut into blocks of clients that are trained at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.simulations.engine.block_result import BlockResult
from corymb.strategies import Layout

MOST = 32  # clients in a block
LARGEST = 1 << 26  # parameters in a block, should all have to be written out
FEWEST = 4  # blocks in a large enough push: as many processes have work
SMALLEST = 1 << 24  # examples times parameters, for which a block is worth its overhead
PADDED = 1.5  # times its examples, what a block may hold with its padding


Targets = Sequence[tuple[int, Tensor]]  # numbers of models in a block, and where each is wanted


@dataclass(frozen=True)
class Task:
    """Clients to train at once, largest first; `requests` are the numbers of their messages among those of the push."""

    requests: tuple[int, ...]
    clients: tuple[int, ...]
    settings: TrainSettings
    server_round: int


def most_clients(parameters: int) -> int:
    """How many clients a block of models with so many `parameters` may have."""
    return max(1, min(MOST, LARGEST // parameters))


def cut(sizes: Sequence[int], settings: TrainSettings, parameters: int = 1, fewest: int = FEWEST) -> list[list[int]]:
    """Blocks of places in `sizes` (the examples of each client), by size so that little is padding.

    What the blocks are depends on that and on how many `parameters` a model has, so it does not matter who trains them.
    There are at least the `fewest` where that is worth its overhead.
    """
    most = most_clients(parameters)
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    passed = [
        settings.steps * settings.batch_size if settings.steps else size * (settings.epochs or 1) for size in sizes
    ]
    enough = max(1, sum(passed) * parameters // SMALLEST)
    number = max(-(-len(order) // most), min(fewest, len(order), enough))
    each, more = divmod(len(order), number)
    ends = {block * each + min(block, more) for block in range(number)}  # the larger blocks first
    blocks: list[list[int]] = []
    largest = held = count = 0  # of the last block: the most examples of a client, of all, and its clients
    for position, place in enumerate(order):
        size = sizes[place]
        # Under a fixed number of steps all do the same, whatever their sizes.
        is_padded = settings.steps is None and largest * (count + 1) > PADDED * (held + size)
        if position in ends or is_padded:
            blocks.append([])
            largest, held, count = size, 0, 0
        blocks[-1].append(place)
        held, count = held + size, count + 1
    return blocks


class ClientBlock(ABC):
    """What blocks of K clients share whose models are not written out; see `strategies.core.rows.Rows`."""

    def __init__(self, clients: int, layout: Layout) -> None:
        self.count = clients
        self._layout = layout
        self._models: tuple[Tensor, ...] = ()  # if they have been written out

    @abstractmethod
    def _copy_to(self, targets: Targets) -> Callable[[], None]:
        """Write out models of which none has been written out before."""

    def copy_to(self, targets: Targets) -> Callable[[], None]:
        """See `Rows`."""
        if not self._models:
            return self._copy_to(targets)
        copy_rows(self._models, targets)
        return lambda: None

    def pieces(self, row: int) -> tuple[Tensor, ...]:
        """See `Rows`; all models are written out for the first that is asked for."""
        if not self._models:
            rows = torch.empty(self.count, self._layout.num_parameters, dtype=self._layout.dtype).unbind()
            self._copy_to(list(enumerate(rows)))()
            self._models = rows
        return tuple(self._models[row][entry.start : entry.stop] for entry in self._layout.parameters)


class TrainedBlock(ClientBlock):
    """A block that was trained in this process."""

    def __init__(self, result: BlockResult, start: Tensor, layout: Layout) -> None:
        super().__init__(len(result.report.steps), layout)
        self._result, self._start = result, start

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`."""
        moved = with_drift(self._result.moved(weights.to(self._start.dtype)), weights, self._start, origin)

        def finish() -> None:
            total.add_(moved)

        return finish

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Rows`."""
        squares = self._result.squares(offset_of(centre, self._start))
        return lambda: squares

    def _copy_to(self, targets: Targets) -> Callable[[], None]:
        copy_rows(self._result.models(), targets)
        return lambda: None


def copy_rows(models: Sequence[Tensor] | Tensor, targets: Targets) -> None:
    """Copy the models with these numbers, each `[P]`."""
    for number, row in targets:
        row.copy_(models[number])


def offset_of(centre: Tensor, start: Tensor) -> Tensor | None:
    """What has to be added to `start` to get to `centre`, in its precision; None for nothing."""
    return None if is_same(start, centre) else (centre - start).to(start.dtype)


def is_same(start: Tensor, origin: Tensor) -> bool:
    """Whether both are the same vector; nearly always they are the same memory."""
    return start.data_ptr() == origin.data_ptr() or torch.equal(start, origin)


def with_drift(moved: Tensor, weights: Tensor, start: Tensor, origin: Tensor) -> Tensor:
    """The weighted sum of moves from `start`, as one of moves from `origin`."""
    if is_same(start, origin):
        return moved
    return moved + (start.double() - origin) * weights.sum()
