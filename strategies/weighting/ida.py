"""Inverse distance aggregation."""

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
    """Yeganeh et al. 2020, IDA: a model counts less the farther it lies from the average model.

    `factors` are multiplied, joined by "+": "distance" is IDA, "distance+examples" IDA with FedAvg,
    "accuracy" INTRAC (one over the reported training accuracy), "distance+accuracy" and
    "distance+examples+accuracy" their combinations. `centre` is the point that distances are taken to:
    "mean", "weighted" (by examples) or "median"; `norm` 1 or 2 runs over all parameters together. A model
    on the centre would take all of the weight: distances are raised by `epsilon` times their mean.
    `floor` is the least accuracy that INTRAC divides by (1 / number of classes).
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
        one_of(("1", "2"), norm=str(self.norm))
        at_least(0, epsilon=self.epsilon)
        positive(floor=self.floor)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """The mixture by the product of the chosen factors."""
        weights = torch.ones(len(cohort.nodes), dtype=torch.float64)
        for factor in self.factors.split("+"):
            weights = weights * getattr(self, f"_{factor}")(cohort)
        if not weights.sum() > 0:
            weights = torch.ones_like(weights)
        weights = weights / weights.sum()
        return Mix(cohort.mixed(weights), weights=weights)

    def _distance(self, cohort: Cohort) -> Tensor:
        distances = self._lengths(cohort)
        distances += self.epsilon * distances.mean()
        return 1 / distances if distances.all() else torch.ones_like(distances)

    def _lengths(self, cohort: Cohort) -> Tensor:
        """Of the differences from the centre, `[K]`."""
        equal = torch.full_like(cohort.shares, 1 / len(cohort.nodes))
        shares = cohort.shares if self.centre == "weighted" else equal
        if self.norm == 2 and self.centre != "median":  # asks for no model to be written out
            return cohort.distances(cohort.mixed(shares))
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
                "IDA with the factor 'accuracy' needs the metric 'accuracy' and no reply has it; "
                "report it from the client, or leave the factor out."
            )
        # A site that does not report one counts nothing: the floor would give it the most.
        return (1 / cohort.metrics["accuracy"].clamp(min=self.floor)).nan_to_num(nan=0.0)
