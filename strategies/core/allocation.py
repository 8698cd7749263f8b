"""How large tensors of a round are allocated: the matrix of its models, which a server may put elsewhere than in
memory, and the sum of its replies, which gives its memory back piece by piece.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

LARGE = 1 << 24  # bytes, from which on a sum has a memory mapping of its own
Allocate = Callable[[int, int, torch.dtype], Tensor]  # (rows, columns, dtype) -> an uninitialised matrix


def _in_memory(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)


_allocate: ContextVar[Allocate] = ContextVar("allocate", default=_in_memory)


def empty_matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised matrix for the models of a round."""
    return _allocate.get()(rows, columns, dtype)


@contextmanager
def allocating(allocate: Allocate) -> Iterator[None]:
    """Let `allocate` make the matrices within this context."""
    token = _allocate.set(allocate)
    try:
        yield
    finally:
        _allocate.reset(token)


def vanishing_zeros(count: int) -> tuple[Tensor, Callable[[int, int], None]]:
    """Return zeros `[count]` float64, and a function that gives the memory of the numbers `start` to `stop` back.

    Those numbers must not be read afterwards. The function does nothing if the tensor is small, or on Windows.
    """
    size = count * torch.float64.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_DONTNEED"):
        return torch.zeros(count, dtype=torch.float64), lambda start, stop: None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def free(start: int, stop: int) -> None:
        first = -(-start * torch.float64.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        last = min(stop * torch.float64.itemsize, size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    return torch.frombuffer(memory, dtype=torch.float64), free
