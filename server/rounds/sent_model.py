"""The state's model as the record that is sent, and whether somebody has changed that record since."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import flwr.app
from flwr.app import ArrayRecord

from corymb.protocol.codec import Array, to_arrays, to_state
from corymb.strategies import Layout, Model

Marks = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class SentModel:
    """`arrays` that hold the state's model, and the marks by which a change of them shows."""

    arrays: ArrayRecord
    marks: Marks

    @classmethod
    def of(cls, model: Model) -> SentModel:
        """A record that shares the memory of `model`."""
        arrays = to_arrays(model.layers.restore(model))
        return cls(arrays, _marks(arrays))

    def is_still(self, arrays: ArrayRecord) -> bool:
        """Whether `arrays` are this record, and nobody has changed it, in place either."""
        return arrays is self.arrays and _marks(arrays) == self.marks


def model_in(arrays: ArrayRecord, buffers: Collection[str] | None) -> Model:
    """The model in `arrays`, copied; `buffers` names its float buffers (default: BatchNorm's statistics)."""
    state = to_state(arrays)
    return Layout.of(state, buffers).flatten(state)


def _marks(arrays: ArrayRecord) -> Marks:
    return tuple((name, id(array), _version(array)) for name, array in arrays.items())


def _version(array: flwr.app.Array) -> int:
    """A number that changes when the array's numbers do."""
    if not isinstance(array, Array):
        return id(array.data)
    return 0 if array.tensor.is_inference() else array.tensor._version
