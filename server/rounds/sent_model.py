"""The state's model as the ArrayRecord that is sent, and the detection of changes to that record."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import flwr.app
from flwr.app import ArrayRecord

from corymb.protocol.codec import Array, to_arrays, to_state
from corymb.strategies import Layout, Model

Versions = tuple[tuple[str, int, int], ...]  # of each array: name, id of the object, version of its values


@dataclass(frozen=True)
class SentModel:
    """The record `arrays` of the state's model, and the `versions` of its arrays, which differ after any change."""

    arrays: ArrayRecord
    versions: Versions

    @classmethod
    def of(cls, model: Model) -> SentModel:
        """Make a record that shares the memory of `model`."""
        arrays = to_arrays(model.layers.restore(model))
        return cls(arrays, _versions(arrays))

    def is_unchanged(self, arrays: ArrayRecord) -> bool:
        """Return whether `arrays` is this record and has not been changed, not even in place."""
        return arrays is self.arrays and _versions(arrays) == self.versions


def model_in(arrays: ArrayRecord, buffers: Collection[str] | None) -> Model:
    """Return a copy of the model in `arrays`. `buffers` names its float buffers (default: BatchNorm's statistics)."""
    state = to_state(arrays)
    return Layout.of(state, buffers).flatten(state)


def _versions(arrays: ArrayRecord) -> Versions:
    return tuple((name, id(array), _version(array)) for name, array in arrays.items())


def _version(array: flwr.app.Array) -> int:
    """Return a number that changes when the values of the array change."""
    if not isinstance(array, Array):
        return id(array.data)
    return 0 if array.tensor.is_inference() else array.tensor._version
