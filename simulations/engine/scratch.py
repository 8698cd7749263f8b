"""Memory that is used again: to get fresh memory from the system takes longer than to fill it."""

from __future__ import annotations

import math

from torch import Tensor


class Scratch:
    """Scratch for one tensor at a time, as large as the largest that it was asked for."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def of(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of the `shape`, with anything in it; the one before is lost."""
        if like.is_cuda:  # where torch does so itself, and a recording may have to keep what it got
            return like.new_empty(shape)
        count = math.prod(shape)
        if self._flat is None or self._flat.numel() < count or self._flat.dtype != like.dtype:
            self._flat = like.new_empty(count)
        return self._flat[:count].view(shape)
