"""Coherence: how similar the directions of a round's updates are, and the label distributions of its clients.

Source: Li et al. 2023, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corymb.strategies.core.geometry import cosines, inner_products


class Coherence(NamedTuple):
    """Cosines between the updates of a round; NaN where an update is zero.

    `pairs [K, K]` are the cosines of every two clients, and `mean` is their mean over different clients. `client_mean
    [K]` is each client's mean cosine with the others. `with_mean [K]` is its cosine with the mean update.
    """

    pairs: Tensor
    mean: float
    client_mean: Tensor
    with_mean: Tensor


def coherence(models: Tensor, origin: Tensor) -> Coherence:
    """Return the coherence of the updates `models [K, P] - origin [P]`. The means leave out zero updates."""
    products = inner_products(models, origin)
    pairs = cosines(products)
    others = pairs.clone().fill_diagonal_(torch.nan)
    with_mean = products.mean(dim=1) / (products.diagonal().sqrt() * products.mean().clamp(min=0).sqrt())
    return Coherence(pairs, float(others.nanmean()), others.nanmean(dim=1), with_mean)


def label_coherence(histograms: Tensor, total: Tensor | None = None) -> Tensor:
    """Return the cosine of each client's class counts `histograms [K, C]` with `total [C]` (default: their sum)."""
    total = histograms.sum(dim=0) if total is None else total
    return torch.nn.functional.cosine_similarity(histograms, total[None], dim=1)
