"""The door's checks of the arrays in a reply. Cheap checks come first, before anything large is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from corymb.protocol.codec import DTYPES, CodecError, to_tensor
from corymb.protocol.compression import UPDATE, BadUpdate, settings_in
from corymb.protocol.records import ARRAYS, STEPS
from corymb.server.rounds.rejections import Code, Refused, short
from corymb.strategies import Layout, Model
from corymb.strategies.core.layout import Role
from corymb.strategies.core.rows import CHUNK

MOST_STEPS = 256  # a client may send the updates of at most this many batches
# The largest absolute value that a model may have. Trained models stay far below it, and its product with MAX_EXAMPLES
# is finite in float32.
LARGEST_NUMBER = 1e20


def decoded_model(arrays: ArrayRecord, layout: Layout) -> dict[str, Tensor]:
    """Return the parameters and float buffers in `arrays`. Integer buffers are not decoded: the server keeps its own.

    Raises `Refused` unless all arrays match `layout` and every decoded number is at most `LARGEST_NUMBER` in size.
    """
    _check_headers(arrays, layout)
    state = {entry.name: _decoded(entry.name, arrays) for entry in (*layout.parameters, *layout.buffers)}
    for name, tensor in state.items():
        _require_bounded(tensor, f"tensor {name!r}")
    return state


def decoded_buffers(arrays: ArrayRecord, layout: Layout) -> Tensor:
    """Return the float buffers in `arrays`, `[B]`. Raises `Refused` as `decoded_model` does."""
    _check_headers(arrays, layout)
    state = {entry.name: _decoded(entry.name, arrays) for entry in layout.buffers}
    for name, tensor in state.items():
        _require_bounded(tensor, f"tensor {name!r}")
    return layout.buffers_of(state)


def decoded_steps(arrays: ArrayRecord, layout: Layout) -> Tensor:
    """Return the updates of S batches in `arrays`, `[S, P]`. Raises `Refused` if they are invalid."""
    names = [entry.name for entry in layout.parameters]
    if list(arrays) != names:
        raise Refused(Code.NAMES, f"its record {STEPS!r} does not have the model's parameters in the same order")
    count = arrays[names[0]].shape[0] if names and arrays[names[0]].shape else 0
    if not 0 < count <= MOST_STEPS:
        raise Refused(Code.SHAPE, f"its record {STEPS!r} has {short(count)} batches, not 1 to {MOST_STEPS}")
    pieces = []
    for entry in layout.parameters:
        array, shape = arrays[entry.name], (count, *entry.shape)
        if tuple(array.shape) != shape or DTYPES.get(array.dtype) != entry.dtype:
            raise Refused(Code.SHAPE, f"tensor {entry.name!r} in {STEPS!r} is not {entry.dtype} {list(shape)}")
        piece = _decoded(entry.name, arrays)
        _require_bounded(piece, f"tensor {entry.name!r} in {STEPS!r}")
        pieces.append(piece.reshape(count, -1).to(layout.dtype))
    return torch.cat(pieces, dim=1)


def restored_model(
    content: Mapping[str, Any], compression: Mapping[str, Any], layout: Layout, sent: Model
) -> tuple[Tensor, Tensor]:
    """Return the parameters `[P]` and the float buffers `[B]` of a reply with a compressed update of `sent`.

    Raises `Refused` if they are invalid.
    """
    arrays, rest = content.get(UPDATE), content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(rest, ArrayRecord):
        raise Refused(Code.RECORDS, f"it is compressed and lacks the record {UPDATE!r} or {ARRAYS!r}")
    others = Layout(tuple(entry for entry in layout.entries if entry.role is not Role.PARAMETER))
    _check_headers(rest, others)
    buffers = {entry.name: _decoded(entry.name, rest) for entry in layout.buffers}
    for name, tensor in buffers.items():
        _require_bounded(tensor, f"tensor {name!r}")
    try:
        tensors = {name: _decoded(name, arrays) for name in arrays}
        update = settings_in(compression).restore(tensors, layout.num_parameters)
    except BadUpdate as error:
        raise Refused(Code.SHAPE, short(error)) from None
    vector = (sent.parameters.to(update.dtype) + update).to(layout.dtype)
    _require_bounded(vector, "the restored model")
    return vector, layout.buffers_of(buffers)


def is_bounded(tensor: Tensor, bound: float) -> bool:
    """Return whether the absolute value of every number is at most `bound`; False if one is NaN."""
    for piece in tensor.reshape(-1).split(CHUNK):
        if piece.numel():
            least, most = piece.aminmax()  # both are NaN if any number is
            if not (least >= -bound and most <= bound):
                return False
    return True


def _check_headers(arrays: ArrayRecord, layout: Layout) -> None:
    """Compare the declared names, shapes and dtypes of `arrays` with `layout`. Raises `Refused` if they differ."""
    expected = {entry.name: entry for entry in layout.entries}
    if missing := expected.keys() - arrays.keys():
        raise Refused(Code.NAMES, f"tensor {min(missing)!r} is missing")
    if extra := arrays.keys() - expected.keys():
        raise Refused(Code.NAMES, f"tensor {short(min(extra))} is not in the model")
    for name, entry in expected.items():
        array = arrays[name]
        if tuple(array.shape) != entry.shape:
            declared = short(list(array.shape))
            raise Refused(Code.SHAPE, f"tensor {name!r} has the shape {declared}, not {list(entry.shape)}")
        if DTYPES.get(array.dtype) != entry.dtype:
            raise Refused(Code.DTYPE, f"tensor {name!r} has the dtype {short(array.dtype)}, not {entry.dtype}")


def _decoded(name: str, arrays: ArrayRecord) -> Tensor:
    try:
        return to_tensor(name, arrays[name])
    except CodecError as error:
        raise Refused(Code.BYTES, short(error)) from None


def _require_bounded(tensor: Tensor, description: str) -> None:
    if not is_bounded(tensor, LARGEST_NUMBER):
        raise Refused(Code.NOT_FINITE, f"{description} has NaN, infinity or numbers beyond {LARGEST_NUMBER:g}")
