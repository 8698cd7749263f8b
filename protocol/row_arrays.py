"""One model from a block of client models, as the ArrayRecord of a message.

The tensors are read from the block only when the record is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord
from torch import Tensor

from corymb.protocol.codec import Array
from corymb.protocol.flower import unchecked_arrays
from corymb.strategies import Layout
from corymb.strategies.core.layout import Entry
from corymb.strategies.core.rows import Rows


@dataclass(frozen=True, eq=False)
class ModelRow:
    """One model: row `row` of `rows`, with the given `layout`.

    `bound` is an upper bound on the absolute values of the model's numbers; NaN if some may be NaN.
    """

    rows: Rows
    row: int
    layout: Layout
    bound: float

    def to_record(self, buffers: Mapping[str, Tensor]) -> ArrayRecord:
        """Return the model as an ArrayRecord for a message, with the model's `buffers`, which the rows do not hold."""
        arrays: dict[str, Array] = {
            entry.name: RowArray(self, index, entry) for index, entry in enumerate(self.layout.parameters)
        }
        if buffers:
            arrays |= {name: Array(tensor) for name, tensor in buffers.items()}
            arrays = {entry.name: arrays[entry.name] for entry in self.layout.entries}
        return unchecked_arrays(arrays)


class RowArray(Array):
    """One tensor of a `ModelRow`. Each access reads it from the rows again."""

    def __init__(self, row: ModelRow, index: int, entry: Entry) -> None:
        self.row, self._index, self._entry = row, index, entry
        self._describe(entry.dtype, entry.shape)

    @property
    def tensor(self) -> Tensor:
        """See `Array`."""
        piece: Tensor = self.row.rows.pieces(self.row.row)[self._index]
        return piece.reshape(self._entry.shape).to(self._entry.dtype)


RowArray.__qualname__ = Array.__qualname__  # Flower writes this name into the encoded record


def row_in(arrays: ArrayRecord, layout: Layout) -> ModelRow | None:
    """Return the `ModelRow` that `arrays` was made from, or None if the record was changed or has another layout."""
    if not layout.parameters or len(arrays) != len(layout.entries):
        return None
    first = arrays.get(layout.parameters[0].name)
    if not isinstance(first, RowArray) or (first.row.layout is not layout and first.row.layout != layout):
        return None
    for entry in layout.parameters:
        array = arrays.get(entry.name)
        if not isinstance(array, RowArray) or array.row is not first.row or array._entry.name != entry.name:
            return None
    return first.row
