"""A model in a block of clients, as the record of a message: written out when somebody reads it."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView

from flwr.app import Array, ArrayRecord

from corymb.protocol.codec import to_arrays
from corymb.strategies import Layout
from corymb.strategies.block import Block, InBlock


class BlockArrays(ArrayRecord):
    """The state dict of one client of a `block`, of a module without buffers.

    `bound` is what no number of it exceeds in size, NaN where one may be none.
    """

    def __init__(self, block: Block, index: int, layout: Layout, bound: float) -> None:
        super().__init__()
        self.__dict__.update(place=InBlock(block, index), _layout=layout, bound=bound)

    place: InBlock
    bound: float

    def fits(self, layout: Layout) -> bool:
        """Whether its model has this layout."""
        mine: Layout | None = self.__dict__["_layout"]
        return mine is not None and (mine is layout or mine == layout)

    def _change(self) -> None:
        """From here on it is a record like any other."""
        self._read()
        self.__dict__["_layout"] = None

    def _read(self) -> None:
        if self.__dict__["_layout"] is None or self.__dict__["_data"]:
            return
        entries = self.__dict__["_layout"].parameters
        pieces = zip(entries, self.place, strict=True)
        state = {entry.name: piece.reshape(entry.shape).to(entry.dtype) for entry, piece in pieces}
        self.__dict__["_data"] = dict(to_arrays(state).items())

    def __getitem__(self, key: str) -> Array:
        self._read()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._read()
        return super().__iter__()

    def __len__(self) -> int:
        self._read()
        return super().__len__()

    def __setitem__(self, key: str, value: Array) -> None:
        self._change()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._change()
        super().__delitem__(key)

    def __repr__(self) -> str:
        self._read()
        return super().__repr__()

    def __contains__(self, key: object) -> bool:
        self._read()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._read()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # as any mapping

    def keys(self) -> KeysView[str]:
        """The names."""
        self._read()
        return super().keys()

    def values(self) -> ValuesView[Array]:
        """The arrays."""
        self._read()
        return super().values()

    def items(self) -> ItemsView[str, Array]:
        """Names and arrays."""
        self._read()
        return super().items()

    def copy(self) -> ArrayRecord:  # type: ignore[override]
        """A plain record that may be changed."""
        return ArrayRecord(dict(self.items()))
