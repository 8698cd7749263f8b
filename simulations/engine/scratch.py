"""Scratch buffers that are reused: allocating fresh memory from the system takes longer than filling it."""

from __future__ import annotations

import math

from torch import Tensor


class Scratch:
    """A buffer for one tensor at a time, which grows to the largest size requested."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def of(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of this `shape`, in the dtype of `like`; it overwrites the one before."""
        if like.is_cuda:  # torch's CUDA allocator reuses memory already, and a CUDA graph has to keep its own
            return like.new_empty(shape)
        count = math.prod(shape)
        if self._flat is None or self._flat.numel() < count or self._flat.dtype != like.dtype:
            self._flat = like.new_empty(count)
        return self._flat[:count].view(shape)
