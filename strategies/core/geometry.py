"""Distances and angles between models, exact: differences are taken before they are squared, and summed in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

COLUMNS = 1 << 18  # numbers in a block of coordinates: two megabytes, which stay in the cache
WIDTH = 1 << 14  # the same for float32, of every row
LEFT = 0.03  # of two squares, what has to be left of them for their rounding not to matter


def blocks(models: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`models [K, P]` and `others [P]` cut into the same float64 blocks of coordinates."""
    width = max(1, COLUMNS // max(1, len(models)))
    for start in range(0, models.shape[1], width):
        piece = slice(start, start + width)
        yield models[:, piece].double(), *(other[piece].double() for other in others)


def squared_distances(models: Tensor) -> Tensor:
    """The squared distance between every two rows of `models [K, P]`, `[K, K]` float64, right to 1e-5.

    From the inner products of the rows' differences from one of them: five times as fast as every two rows' difference,
    which is taken of rows that lie much closer to another than to that one: too little is left of their products.
    """
    inner = torch.zeros(len(models), len(models), dtype=torch.float64)
    for start in range(0, models.shape[1], WIDTH):
        block = models[:, start : start + WIDTH]
        block = block - block[len(block) // 2]
        inner += block @ block.T
    squares = inner.diagonal()
    sums = squares[:, None] + squares
    total = (sums - (inner + inner.T)).clamp_(min=0)  # of equals, whom a rule prefers must not depend on rounding
    sound = total.isfinite() & (total > LEFT * sums)
    near = (~sound.fill_diagonal_(True)).any(dim=1).nonzero()[:, 0]
    if len(near):  # with all others, so that equals stay as far from them as each other
        total[near] = 0
        for (block,) in blocks(models):
            total[near] += torch.cdist(block[near], block, compute_mode="donot_use_mm_for_euclid_dist").square()
        total[:, near] = total[near].T
    return total.fill_diagonal_(0)


def norms(models: Tensor, centre: Tensor) -> Tensor:
    """The distance of each row of `models [K, P]` from `centre [P]`, `[K]` float64."""
    total = torch.zeros(len(models), dtype=torch.float64)
    for block, middle in blocks(models, centre):
        total += (block - middle).square().sum(dim=1)
    return total.sqrt()


def products(models: Tensor, centre: Tensor) -> Tensor:
    """The inner products of the differences `models [K, P] - centre [P]`, `[K, K]` float64."""
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    for block, middle in blocks(models, centre):
        differences = block - middle
        total += differences @ differences.T
    return total


def cosines(products: Tensor) -> Tensor:
    """The cosines that belong to inner products `[K, K]`; NaN where a vector is zero."""
    lengths = products.diagonal().sqrt()
    return products / (lengths[:, None] * lengths)
