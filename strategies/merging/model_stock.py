"""As far towards the mean as the models agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import cosines, products
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class ModelStock(SightedRule[None]):
    """Jang et al. 2024, Model Stock: between the old model and the mean, by the angle of the updates.

    Tensor by tensor, `t = K cos / (1 + (K - 1) cos)` of the way to the mean, kept within [0, 1]; `cos` is the mean
    cosine between two updates, zero updates left out. A single model is taken whole.
    """

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Interpolate each tensor by itself."""
        return Mix(cohort.by_layer(self._layer))

    def _layer(self, layer: Cohort) -> Tensor:
        clients = len(layer.nodes)
        share = stock_share(cosines(products(layer.models, layer.origin)))
        return layer.mixed(torch.full((clients,), share / clients, dtype=torch.float64))


def stock_share(pairs: Tensor) -> float:
    """How far to go to the mean, from the cosines of the updates `[K, K]`; in [0, 1]."""
    clients = len(pairs)
    if clients == 1:
        return 1.0
    cosine = float(pairs.clone().fill_diagonal_(torch.nan).nanmean().nan_to_num(nan=0.0))
    below = 1 + (clients - 1) * cosine
    return min(1.0, max(0.0, clients * cosine / below)) if below > 0 else 0.0
