"""Model Stock: a step towards the mean, which is longer if the directions of the updates agree better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import cosines, inner_products
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class ModelStock(SightedRule[None]):
    """Jang et al. 2024, Model Stock: interpolates between the old model and the mean, by the angle of the updates.

    Each tensor moves the share `t = K cos / (1 + (K - 1) cos)` of the way to the mean, clamped to [0, 1]. `cos` is
    the mean cosine between two updates, zero updates left out. With a single reply, its model is the next model.
    """

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Interpolate each tensor separately."""
        return Mix(cohort.by_layer(self._layer))

    def _layer(self, layer: Cohort) -> Tensor:
        clients = len(layer.nodes)
        share = stock_share(cosines(inner_products(layer.models, layer.origin)))
        return layer.mixed(torch.full((clients,), share / clients, dtype=torch.float64))


def stock_share(pairs: Tensor) -> float:
    """Return the share of the way to the mean, in [0, 1], from the cosines between the updates, `pairs [K, K]`."""
    clients = len(pairs)
    if clients == 1:
        return 1.0
    cosine = float(pairs.clone().fill_diagonal_(torch.nan).nanmean().nan_to_num(nan=0.0))
    denominator = 1 + (clients - 1) * cosine
    return min(1.0, max(0.0, clients * cosine / denominator)) if denominator > 0 else 0.0
