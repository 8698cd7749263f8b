"""Distances and angles between models, exact: differences are taken before they are squared, and summed in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

COLUMNS = 1 << 20  # numbers in a block of coordinates
LOST = 1e-6  # of two squares, what is left between rows whose distance float64 gives to ten digits


def blocks(models: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`models [K, P]` and `others [P]` cut into the same float64 blocks of coordinates."""
    width = max(1, COLUMNS // max(1, len(models)))
    for start in range(0, models.shape[1], width):
        piece = slice(start, start + width)
        yield models[:, piece].double(), *(other[piece].double() for other in others)


def squared_distances(models: Tensor) -> Tensor:
    """The squared distance between every two rows of `models [K, P]`, `[K, K]` float64.

    From the inner products of the rows' differences from one of them, in float64; where so little is left of those that
    rounding may show, from the two rows themselves.
    """
    inner = products(models, models[0])
    squares = inner.diagonal()
    sums = squares[:, None] + squares
    total = (sums - 2 * inner).clamp_(min=0)
    doubtful = (total < LOST * sums).triu(diagonal=1).nonzero().tolist()
    for one, other in doubtful:
        apart = norms(models[one : one + 1], models[other]).square()
        total[one, other] = total[other, one] = apart
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
