"""A push of training messages, cut into blocks of clients that are trained at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.simulations.engine.trained import Trained
from corymb.strategies import Layout
from corymb.strategies.block import Wanted
from corymb.strategies.geometry import norms

MOST = 32  # clients in a block
LARGEST = 1 << 26  # parameters in a block, should all have to be written out
FEWEST = 4  # blocks in a large enough push: as many processes have work
SMALLEST = 1 << 24  # examples times parameters, for which a block is worth its overhead
PADDED = 1.5  # times its examples, what a block may hold with its padding


@dataclass(frozen=True)
class Task:
    """Clients to train at once, largest first; the numbers of their messages among those asked are `asked`."""

    asked: tuple[int, ...]
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
    """What blocks of K clients share whose models are not written out: see `strategies.block.Block`."""

    def __init__(self, clients: int, layout: Layout) -> None:
        self.clients = clients
        self._layout = layout
        self._models: tuple[Tensor, ...] = ()  # if they have been written out

    @abstractmethod
    def _write(self, into: Wanted) -> Callable[[], None]:
        """Write out models of which none has been written out before."""

    def write(self, into: Wanted) -> Callable[[], None]:
        """See `Block`."""
        if not self._models:
            return self._write(into)
        copy_rows(self._models, into)
        return lambda: None

    def model(self, index: int) -> tuple[Tensor, ...]:
        """See `Block`; all models are written out for the first that is asked for."""
        if not self._models:
            rows = torch.empty(self.clients, self._layout.num_parameters, dtype=self._layout.dtype).unbind()
            self._write(list(enumerate(rows)))()
            self._models = rows
        return cut_up(self._models[index], self._layout)


class TrainedBlock(ClientBlock):
    """A block that was trained in this process."""

    def __init__(self, trained: Trained, start: Tensor, layout: Layout) -> None:
        super().__init__(len(trained.report.steps), layout)
        self._trained, self._start = trained, start

    def moves(self, weights: Tensor, origin: Tensor) -> Callable[[], Tensor]:
        """See `Block`."""
        total = with_drift(self._trained.moved(weights.to(self._start.dtype)), weights, self._start, origin)
        return lambda: total

    def squares(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Block`."""
        squares = self._trained.squares(offset_of(centre, self._start))
        return lambda: squares

    def _write(self, into: Wanted) -> Callable[[], None]:
        copy_rows(self._trained.models(), into)
        return lambda: None


class WrittenBlock:
    """A block of models that are written out, `[K, P]`."""

    def __init__(self, models: Tensor, layout: Layout) -> None:
        self._models, self._layout = models, layout
        self.clients = len(models)

    def moves(self, weights: Tensor, origin: Tensor) -> Callable[[], Tensor]:
        """See `Block`."""
        kept = weights.nonzero()[:, 0]
        total = weights[kept].double() @ (self._models[kept] - origin).double()
        return lambda: total

    def squares(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Block`."""
        squares = norms(self._models, centre).square()
        return lambda: squares

    def write(self, into: Wanted) -> Callable[[], None]:
        """See `Block`."""
        copy_rows(self._models, into)
        return lambda: None

    def model(self, index: int) -> tuple[Tensor, ...]:
        """See `Block`."""
        return cut_up(self._models[index], self._layout)


def cut_up(vector: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """A flat model as the layout's pieces."""
    return tuple(vector[entry.start : entry.stop] for entry in layout.parameters)


def copy_rows(models: Sequence[Tensor] | Tensor, into: Wanted) -> None:
    """Copy the models with these numbers, each `[P]`."""
    for number, row in into:
        row.copy_(models[number])


def offset_of(centre: Tensor, start: Tensor) -> Tensor | None:
    """What has to be added to `start` to get to `centre`, in its precision; None for nothing."""
    return None if is_same(start, centre) else (centre - start).to(start.dtype)


def is_same(start: Tensor, origin: Tensor) -> bool:
    """Whether both are the same vector; nearly always they are the same memory."""
    return start.data_ptr() == origin.data_ptr() or torch.equal(start, origin)


def with_drift(total: Tensor, weights: Tensor, start: Tensor, origin: Tensor) -> Tensor:
    """The `total` of moves from `start`, as moves from `origin`."""
    if is_same(start, origin):
        return total
    return total + (start.double() - origin) * weights.sum()
