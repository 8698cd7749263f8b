"""Order statistics of every coordinate at once, by a network of comparisons between whole rows.

A sorting network compares places, whatever they hold, so each comparison is one minimum and one maximum of two rows, at
the speed of memory; and of a network that sorts, only those comparisons are made on which the wanted ranks depend.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WIDTH = 1 << 13  # coordinates in a block: the rows that are compared lie in a cache


def middle(models: Tensor, first: int, last: int) -> Tensor:
    """The mean of the values of ranks `first` to `last`, from 0 and both included, in each column of `models [K, P]`.

    `[P]` float64. Medians and trimmed means are such. Values are finite.
    """
    clients, width = models.shape
    plan = _pruned(clients, first, last)
    result = torch.empty(width, dtype=torch.float64)
    spare = torch.empty(min(WIDTH, width), dtype=models.dtype)
    for start in range(0, width, WIDTH):
        piece = slice(start, start + WIDTH)
        rows = list(models[:, piece].clone())
        free = spare[: len(rows[0])]
        for low, high in plan:
            torch.minimum(rows[low], rows[high], out=free)
            torch.maximum(rows[low], rows[high], out=rows[high])
            rows[low], free = free, rows[low]
        total = result[piece]
        total.copy_(rows[first])
        for row in rows[first + 1 : last + 1]:
            total += row
        total /= last + 1 - first
    return result


def median(models: Tensor) -> Tensor:
    """The median of each column of `models [K, P]`, `[P]` float64; of an even number, the mean of the middle two."""
    return middle(models, (len(models) - 1) // 2, len(models) // 2)


@lru_cache(maxsize=64)
def _pruned(size: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """The comparisons, in order, that bring the values of ranks `first` to `last` to those places in some order."""
    # What is wanted of a place, seen from the end: nothing (0), to be one of the middle (1), or one of a pair.
    wanted = [int(first <= place <= last) for place in range(size)]
    needed = []
    for number, (low, high) in enumerate(reversed(_sorting(size)), start=2):
        if wanted[low] != wanted[high]:  # else it does not matter which of the two is the lower
            needed.append((low, high))
            wanted[low] = wanted[high] = number
    return tuple(reversed(needed))


def _sorting(size: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange: comparisons that sort `size` values (Knuth, volume 3, 5.2.2, algorithm M)."""
    pairs = []
    top = 1 << max(0, (size - 1).bit_length() - 1)
    merged = top
    while merged > 0:
        step, distance, rest = top, merged, 0
        while True:
            pairs += [(place, place + distance) for place in range(size - distance) if place & merged == rest]
            if step == merged:
                break
            distance, step, rest = step - merged, step >> 1, merged
        merged >>= 1
    return pairs
