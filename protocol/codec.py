"""Conversion between Flower's ArrayRecord and a PyTorch state dict.

Arrays and tensors share memory where possible. The header of a received array is checked before it is used.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import Any, NamedTuple

import flwr.app
import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

NPY = "numpy.ndarray"  # Flower's name for the .npy format
LONGEST_HEADER = 1024  # bytes; the headers that numpy writes have 128

# The dtypes that a message may carry. numpy has no bfloat16, so its bits are sent as two bytes without a meaning
# ("V2"), and only Array.dtype names bfloat16. Code that does not know this fails instead of reading whole numbers.
BFLOAT16 = np.dtype("V2")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.float32, torch.float64, torch.bfloat16,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CodecError(ValueError):
    """An array in a message has a wrong format, dtype, header or number of bytes."""


class Array(flwr.app.Array):
    """A Flower Array that holds a tensor and encodes it only when its bytes are read.

    The class has the same name as its parent because Flower writes the class name into the encoded record. The tensor
    is shared, not copied: a later in-place change of the tensor changes the message.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._describe(tensor.dtype, tensor.shape)

    def _describe(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        name = DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")
        self.__dict__.update(dtype=name, shape=tuple(shape), stype=NPY)  # a new object needs no care of Flower's caches

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, not a copy."""
        return self._tensor

    @property
    def data(self) -> bytes:
        """The bytes of an .npy file, encoded at each access, so that no second copy of the model stays in memory."""
        values = np.asarray(self._values(), order="C")
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
        return b"".join((header.getvalue(), values.data))  # one copy; np.save makes several

    @data.setter
    def data(self, value: bytes) -> None:
        raise AttributeError("The bytes of this Array come from a tensor; to set bytes, create a flwr.app.Array.")

    def numpy(self, copy: bool = True) -> np.ndarray[Any, Any]:
        """The values as an ndarray. By default a copy, as in Flower's own Array, so that an app may modify it.

        Raises `TypeError` for bfloat16, which numpy does not have.
        """
        if self.tensor.dtype == torch.bfloat16:
            raise TypeError("numpy has no bfloat16; read the record with corymb.protocol.codec.to_state.")
        return self._values().copy() if copy else self._values()

    def _values(self) -> np.ndarray[Any, Any]:
        """The values as an ndarray that shares the tensor's memory if it is on the CPU."""
        tensor = self.tensor.cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.uint16).numpy().view(BFLOAT16)
        values: np.ndarray[Any, Any] = tensor.numpy()
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return flwr.app.Array, (self.dtype, self.shape, self.stype, self.data)


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return `state` as an ArrayRecord that shares its memory."""
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = Array(tensor)
    return record


def to_state(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the state dict in `arrays`. Its tensors share the record's memory, so treat them as read-only.

    Raises `CodecError`, which names the invalid array.
    """
    return {name: to_tensor(name, array) for name, array in arrays.items()}


def to_tensor(name: str, array: flwr.app.Array) -> Tensor:
    """Return the tensor of `array` without a copy; `name` appears in errors.

    Nothing is allocated before the header has been checked. Raises `CodecError` if the array is invalid.
    """
    if isinstance(array, Array):
        return array.tensor
    if array.stype != NPY:
        raise CodecError(f"Array {name!r} has the format {array.stype!r}; send {NPY!r}.")
    if array.dtype not in DTYPES:
        raise CodecError(f"Array {name!r} has the dtype {array.dtype!r}; send one of {', '.join(DTYPES)}.")
    header = _read_header(name, array.data)
    wire = BFLOAT16.name if array.dtype == "bfloat16" else array.dtype
    if header.dtype != wire or header.shape != tuple(array.shape):
        raise CodecError(
            f"Array {name!r} declares {array.dtype}{list(array.shape)}, but its bytes are "
            f"{header.dtype}{list(header.shape)}."
        )
    count, present = prod(header.shape), len(array.data) - header.size
    if min(header.shape, default=0) < 0 or count * DTYPES[array.dtype].itemsize != present:
        raise CodecError(
            f"Array {name!r} declares the shape {list(header.shape)} of {wire}, but carries {present} bytes of data."
        )
    values = np.frombuffer(array.data, dtype="uint16" if array.dtype == "bfloat16" else wire, offset=header.size)
    values = values.reshape(header.shape, order="F" if header.fortran else "C")
    return torch.from_numpy(values).view(DTYPES[array.dtype])


with warnings.catch_warnings():
    # torch warns once per process that a tensor made from bytes is read-only. This statement provokes
    # the warning while it is suppressed. This module never writes to such a tensor.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", dtype=np.uint8))


class _Header(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    size: int  # of the header, in bytes


def _read_header(name: str, data: bytes) -> _Header:
    """Parse the header of .npy bytes.

    numpy's own reader is not used, because it allocates as much memory as the header declares.
    """
    magic, version = data[:6], data[6:8]
    if magic != b"\x93NUMPY" or version not in (b"\x01\x00", b"\x02\x00"):
        raise CodecError(f"Array {name!r} carries {len(data)} bytes that are not an .npy file of version 1 or 2.")
    width = 2 if version == b"\x01\x00" else 4
    start = 8 + width
    length = int.from_bytes(data[8:start], "little")
    if length > LONGEST_HEADER or start + length > len(data):
        raise CodecError(
            f"Array {name!r} declares a header of {length} bytes in {len(data)} bytes of data; "
            f"the header is cut off or longer than {LONGEST_HEADER} bytes."
        )
    try:
        dtype, shape, fortran = _parse_header(bytes(data[start : start + length]))
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise CodecError(f"Array {name!r} has a header that cannot be read.") from None
    return _Header(dtype, shape, fortran, start + length)


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> tuple[str, tuple[int, ...], bool]:
    fields = ast.literal_eval(header.decode("latin1").strip())
    shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
    if not (isinstance(shape, tuple) and all(type(n) is int for n in shape) and isinstance(descr, str)):
        raise ValueError(header)
    dtype = np.dtype(descr)
    if not dtype.isnative:
        raise ValueError(header)
    return dtype.name, shape, bool(fortran)
