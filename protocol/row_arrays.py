"""One model among the rows of a block, as the record of a message: written out when somebody reads it."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord
from torch import Tensor

from corymb.protocol.codec import Array
from corymb.strategies import Layout
from corymb.strategies.core.layout import Entry
from corymb.strategies.core.rows import Rows


@dataclass(frozen=True, eq=False)
class ModelRow:
    """Row number `row` of `rows`, a model of this `layout`, which has no buffers.

    `bound` is what no number of it exceeds in size, NaN where one may be none.
    """

    rows: Rows
    row: int
    layout: Layout
    bound: float

    def to_record(self) -> ArrayRecord:
        """The model as a record like any other, to put into a message."""
        record = ArrayRecord()
        for place, entry in enumerate(self.layout.parameters):
            record[entry.name] = RowArray(self, place, entry)
        return record


class RowArray(Array):
    """One tensor of a `ModelRow`, which is read out of its rows each time that somebody asks for it."""

    def __init__(self, row: ModelRow, place: int, entry: Entry) -> None:
        self.row, self._place, self._entry = row, place, entry
        self._describe(entry.dtype, entry.shape)

    @property
    def tensor(self) -> Tensor:
        """See `Array`."""
        piece: Tensor = self.row.rows.pieces(self.row.row)[self._place]
        return piece.reshape(self._entry.shape).to(self._entry.dtype)


RowArray.__qualname__ = Array.__qualname__  # what Flower writes on the wire


def row_in(arrays: ArrayRecord, layout: Layout) -> ModelRow | None:
    """The row that `arrays` are the whole of, unchanged, if it is a model of this `layout`."""
    first = next(iter(arrays.values()), None)
    if not isinstance(first, RowArray) or first.row.layout != layout or len(arrays) != len(layout.parameters):
        return None
    for name, array in arrays.items():
        if not isinstance(array, RowArray) or array.row is not first.row or array._entry.name != name:
            return None
    return first.row
