"""Where the matrix of a round's models is allocated. A server may put large ones elsewhere than in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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
