"""Models that came about together and need not be written out: a block of clients answers sums and distances itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, overload

from torch import Tensor

Wanted = Sequence[tuple[int, Tensor]]  # numbers of models in a block, and where each is wanted


class Block(Protocol):
    """K models of P parameters each. Blocks are compared by identity."""

    @property
    def clients(self) -> int:
        """K."""

    def moves(self, weights: Tensor, origin: Tensor) -> Callable[[], Tensor]:
        """`sum_k weights[k] * (model_k - origin)`, `[P]`, for `weights [K]`; who has weight 0 is not looked at.

        The work may go on elsewhere until what is returned is called.
        """

    def squares(self, centre: Tensor) -> Callable[[], Tensor]:
        """The squared distance of each from `centre [P]`, `[K]` float64, in the same way."""

    def write(self, into: Wanted) -> Callable[[], None]:
        """Write out the models with these numbers, each into a vector `[P]`, in the same way."""

    def model(self, index: int) -> tuple[Tensor, ...]:
        """One model as flat pieces in the layout's order."""


class InBlock(Sequence[Tensor]):
    """The parts of the model at `row` of a `block`, written out when somebody looks at them."""

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.row = block, index

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.block.model(self.row))

    def __len__(self) -> int:
        return len(self.block.model(self.row))

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, place: int | slice) -> Tensor | tuple[Tensor, ...]:
        return self.block.model(self.row)[place]
