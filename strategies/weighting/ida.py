"""IDA: inverse distance aggregation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import blocks
from corymb.strategies.core.order_statistics import median
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, one_of, positive

FACTORS = ("distance", "examples", "accuracy")


@dataclass(frozen=True)
class IDA(SightedRule[None]):
    """Yeganeh et al. 2020, IDA: weighs a model by one over its distance from the average model.

    `factors` names the factors of a weight, joined by "+". "distance" is IDA, "distance+examples" is IDA with FedAvg,
    "accuracy" is INTRAC (one over the reported training accuracy), and "distance+accuracy" and
    "distance+examples+accuracy" combine them. `centre` is the point that distances are measured from: "mean",
    "weighted" (the mean weighted by examples) or "median". `norm`, 1 or 2, is taken over all parameters together.
    `epsilon` times the mean distance is added to each distance, so that a model at the centre does not get all of the
    weight. `floor` is the smallest accuracy that INTRAC divides by; set it to 1 / number of classes.
    """

    factors: str = "distance"
    centre: str = "mean"
    norm: int = 1
    epsilon: float = 1e-8
    floor: float = 0.1

    def __post_init__(self) -> None:
        for factor in self.factors.split("+"):
            one_of(FACTORS, factors=factor)
        one_of(("mean", "weighted", "median"), centre=self.centre)
        one_of((1, 2), norm=self.norm)
        at_least(0, epsilon=self.epsilon)
        positive(floor=self.floor)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Mix the models, with weights proportional to the product of the chosen factors."""
        weights = torch.ones(len(cohort.nodes), dtype=torch.float64)
        for factor in self.factors.split("+"):
            weights = weights * getattr(self, f"_{factor}")(cohort)
        if not weights.sum() > 0:
            weights = torch.ones_like(weights)
        weights = weights / weights.sum()
        return Mix(cohort.mixed(weights), weights=weights)

    def _distance(self, cohort: Cohort) -> Tensor:
        distances = self._centre_distances(cohort)
        distances += self.epsilon * distances.mean()
        return 1 / distances if distances.all() else torch.ones_like(distances)

    def _centre_distances(self, cohort: Cohort) -> Tensor:
        """Return the distance of each model from the centre, `[K]`."""
        equal = torch.full_like(cohort.shares, 1 / len(cohort.nodes))
        shares = cohort.shares if self.centre == "weighted" else equal
        total = torch.zeros_like(shares)
        for (models,) in blocks(cohort.models):
            centre = median(models) if self.centre == "median" else shares @ models
            total += torch.linalg.vector_norm(models - centre, ord=self.norm, dim=1).pow(self.norm)
        return total.pow(1 / self.norm)

    def _examples(self, cohort: Cohort) -> Tensor:
        return cohort.examples

    def _accuracy(self, cohort: Cohort) -> Tensor:
        if "accuracy" not in cohort.metrics:
            raise ValueError(
                "IDA with the factor 'accuracy' needs the metric 'accuracy', but no reply has it; "
                "report it from the client, or leave the factor out."
            )
        # A client that reports no accuracy gets weight 0; the floor would give it the largest weight.
        return (1 / cohort.metrics["accuracy"].clamp(min=self.floor)).nan_to_num(nan=0.0)
