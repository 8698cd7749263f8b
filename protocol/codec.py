"""ArrayRecord <-> state dict, copying nothing where the memory allows, believing nothing that a header says."""

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

NPY = "numpy.ndarray"  # Flower's name for "the bytes are an .npy file"
LONGEST_HEADER = 1024  # bytes; numpy's own are 128

# What may cross the wire. numpy has no bfloat16: it travels as its bits in uint16, and only Array.dtype says so.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.float32, torch.float64, torch.bfloat16,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip


class CodecError(ValueError):
    """An array whose bytes are not what they should be."""


class Array(flwr.app.Array):
    """A Flower Array that stays a tensor until somebody asks for its bytes.

    It has its parent's name because Flower writes the class's name on the wire. The tensor is shared,
    not copied: whoever changes it in place afterwards changes the message.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._describe(tensor.dtype, tensor.shape)

    def _describe(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype = str(dtype).removeprefix("torch.")
        self.shape = tuple(shape)
        self.stype = NPY

    @property
    def tensor(self) -> Tensor:
        """The numbers, shared."""
        return self._tensor

    @property
    def data(self) -> bytes:
        """The .npy bytes, made anew at each call so that no second copy of the model stays in memory."""
        numbers = np.asarray(self.numpy(copy=False), order="C")
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(numbers))
        return b"".join((header.getvalue(), numbers.data))  # one copy, where np.save makes several

    @data.setter
    def data(self, value: bytes) -> None:
        raise AttributeError("This Array holds a tensor; make a flwr.app.Array to set its bytes.")

    def numpy(self, copy: bool = True) -> np.ndarray[Any, Any]:
        """The numbers; a copy, as with Flower's own, so that an app may change what it gets."""
        tensor = self.tensor.cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.contiguous().view(torch.uint16)
        numbers: np.ndarray[Any, Any] = tensor.numpy()
        return numbers.copy() if copy else numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return flwr.app.Array, (self.dtype, self.shape, self.stype, self.data)


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """`state` as a record that shares its memory."""
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = Array(tensor)
    return record


def to_state(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The state dict in `arrays`; tensors share the record's memory, so treat them as read-only.

    Raises `CodecError` naming the array that is broken.
    """
    return {name: to_tensor(name, array) for name, array in arrays.items()}


def to_tensor(name: str, array: flwr.app.Array) -> Tensor:
    """One array's tensor, without a copy. Nothing is allocated before its header has been checked."""
    if isinstance(array, Array):
        return array.tensor
    if array.stype != NPY:
        raise CodecError(f"Array {name!r} has the format {array.stype!r}; only {NPY!r} is read.")
    if array.dtype not in DTYPES:
        raise CodecError(f"Array {name!r} has the dtype {array.dtype!r}; send one of {', '.join(DTYPES)}.")
    header = _header(name, array.data)
    wire = "uint16" if array.dtype == "bfloat16" else array.dtype
    if header.dtype != wire or header.shape != tuple(array.shape):
        raise CodecError(
            f"Array {name!r} says {array.dtype}{list(array.shape)} but its bytes are "
            f"{header.dtype}{list(header.shape)}."
        )
    count, present = prod(header.shape), len(array.data) - header.size
    if min(header.shape, default=0) < 0 or count * np.dtype(wire).itemsize != present:
        raise CodecError(
            f"Array {name!r} claims {list(header.shape)} numbers of {wire} but carries {present} bytes of them."
        )
    numbers = np.frombuffer(array.data, dtype=wire, offset=header.size)
    numbers = numbers.reshape(header.shape, order="F" if header.fortran else "C")
    return torch.from_numpy(numbers).view(DTYPES[array.dtype])


with warnings.catch_warnings():
    # torch says once in a process that memory from bytes is read-only. We know, and only read.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", dtype=np.uint8))


class _Header(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    size: int


def _header(name: str, data: bytes) -> _Header:
    """The header of .npy bytes. Parsed by hand: numpy's reader allocates what the header claims."""
    magic, version = data[:6], data[6:8]
    if magic != b"\x93NUMPY" or version not in (b"\x01\x00", b"\x02\x00"):
        raise CodecError(f"Array {name!r} carries {len(data)} bytes that are no .npy file of version 1 or 2.")
    width = 2 if version == b"\x01\x00" else 4
    start = 8 + width
    length = int.from_bytes(data[8:start], "little")
    if length > LONGEST_HEADER or start + length > len(data):
        raise CodecError(f"Array {name!r} has a header of {length} bytes in {len(data)}; it is cut off or wrong.")
    try:
        dtype, shape, fortran = _parsed(data[start : start + length])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise CodecError(f"Array {name!r} has a header that cannot be read.") from None
    return _Header(dtype, shape, fortran, start + length)


@lru_cache(maxsize=1024)
def _parsed(header: bytes) -> tuple[str, tuple[int, ...], bool]:
    fields = ast.literal_eval(header.decode("latin1").strip())
    shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
    if not (isinstance(shape, tuple) and all(type(n) is int for n in shape) and isinstance(descr, str)):
        raise ValueError(header)
    dtype = np.dtype(descr)
    if not dtype.isnative:
        raise ValueError(header)
    return dtype.name, shape, bool(fortran)
