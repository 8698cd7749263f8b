"""How far the sites of a round pull in one direction, and how alike their data are (Li et al. 2023, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corymb.strategies.core.geometry import cosines, products


class Coherence(NamedTuple):
    """Cosines of updates: `pairs [K, K]`, their `mean` over different sites, each `site`'s mean with the others
    `[K]`, and with the `centre`, the mean update, `[K]`. NaN where an update is zero.
    """

    pairs: Tensor
    mean: float
    site: Tensor
    centre: Tensor


def coherence(models: Tensor, origin: Tensor) -> Coherence:
    """Of the updates `models [K, P] - origin [P]`; zero updates and sites alone count in no mean."""
    inner = products(models, origin)
    pairs = cosines(inner)
    others = pairs.clone().fill_diagonal_(torch.nan)
    mean = inner.mean(dim=1) / (inner.diagonal().sqrt() * inner.mean().clamp(min=0).sqrt())
    return Coherence(pairs, float(others.nanmean()), others.nanmean(dim=1), mean)


def label_coherence(histograms: Tensor, everybody: Tensor | None = None) -> Tensor:
    """The cosine of each site's counts of classes, `histograms [K, C]`, with `everybody [C]` (default: their sum)."""
    everybody = histograms.sum(dim=0) if everybody is None else everybody
    return torch.nn.functional.cosine_similarity(histograms, everybody[None], dim=1)
