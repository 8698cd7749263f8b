"""Distances and angles between models.

For accuracy, differences are taken before they are squared, and all sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_SIZE = 1 << 18  # numbers in a float64 block of coordinates: 2 MiB, which fits the cache
GRAM_COLUMNS = 1 << 14  # columns of a block of models in `squared_distances`
MIN_REMAINDER = 0.03  # least |a - b|^2 / (|a|^2 + |b|^2) at which cancellation leaves enough digits


def blocks(models: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield `models [K, P]` and the vectors `others [P]`, cut into the same blocks of coordinates, as float64."""
    width = max(1, BLOCK_SIZE // max(1, len(models)))
    for start in range(0, models.shape[1], width):
        columns = slice(start, start + width)
        yield models[:, columns].double(), *(other[columns].double() for other in others)


def squared_distances(models: Tensor) -> Tensor:
    """Return the squared distance between every two rows of `models [K, P]`, `[K, K]` float64.

    The relative error is below 1e-5. The function subtracts the middle row from all rows and takes the distances from
    inner products, which is five times as fast as the difference of every two rows. Cancellation makes this
    inaccurate for a row that is much closer to another row than to the middle row. For such rows the function takes
    the differences.
    """
    inner = torch.zeros(len(models), len(models), dtype=torch.float64)
    for start in range(0, models.shape[1], GRAM_COLUMNS):
        block = models[:, start : start + GRAM_COLUMNS]
        block = block - block[len(block) // 2]
        inner += block @ block.T
    squares = inner.diagonal()
    sums = squares[:, None] + squares
    total = (sums - (inner + inner.T)).clamp_(min=0)  # symmetric: rounding must not favour one of two equal models
    accurate = total.isfinite() & (total > MIN_REMAINDER * sums)
    close = (~accurate.fill_diagonal_(True)).any(dim=1).nonzero()[:, 0]
    if len(close):  # recompute their distances to all rows: equal models must stay equally far from every other
        total[close] = 0
        for (block,) in blocks(models):
            total[close] += torch.cdist(block[close], block, compute_mode="donot_use_mm_for_euclid_dist").square()
        total[:, close] = total[close].T
    return total.fill_diagonal_(0)


def norms(models: Tensor, centre: Tensor) -> Tensor:
    """Return the Euclidean distance of each row of `models [K, P]` from `centre [P]`, `[K]` float64."""
    total = torch.zeros(len(models), dtype=torch.float64)
    for block, centre_block in blocks(models, centre):
        total += (block - centre_block).square().sum(dim=1)
    return total.sqrt()


def inner_products(models: Tensor, centre: Tensor) -> Tensor:
    """Return the inner products of the differences `models [K, P] - centre [P]`, `[K, K]` float64."""
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    for block, centre_block in blocks(models, centre):
        differences = block - centre_block
        total += differences @ differences.T
    return total


def cosines(products: Tensor) -> Tensor:
    """Return the cosines between vectors with these inner `products [K, K]`; NaN where a vector is zero."""
    lengths = products.diagonal().sqrt()
    return products / (lengths[:, None] * lengths)
