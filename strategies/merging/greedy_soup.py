"""A soup of the models that improve it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import one_of


@dataclass(frozen=True)
class GreedySoup(SightedRule[None]):
    """Wortsman et al. 2022, GreedySoup: add model after model, best first, and keep those that help.

    A model is kept when the mean with it scores better on the server's proxy data than the best mean so far;
    `score` is "accuracy" or "loss" (the less the better). Equal scores are tried in the order of names. With
    `mean`, the mean by examples is a candidate too. (A uniform soup is FedAvg with `by_examples = false`.)
    """

    needs_proxy = True
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"

    score: str = "accuracy"
    mean: bool = True

    def __post_init__(self) -> None:
        one_of(("accuracy", "loss"), score=self.score)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Candidates are rows of weights over the sites, and a soup is a mean of rows."""
        candidates = list(torch.eye(len(cohort.nodes), dtype=torch.float64))
        if self.mean:
            candidates.append(cohort.shares)
        scores = [self._score(cohort, weights) for weights in candidates]
        order = sorted(range(len(candidates)), key=lambda index: -scores[index])
        kept, best = [candidates[order[0]]], scores[order[0]]
        for index in order[1:]:
            score = self._score(cohort, torch.stack([*kept, candidates[index]]).mean(dim=0))
            if score > best:
                kept, best = [*kept, candidates[index]], score
        weights = torch.stack(kept).mean(dim=0)
        return Mix(cohort.mixed(weights), weights=weights, notes={"ingredients": len(kept)})

    def _score(self, cohort: Cohort, weights: Tensor) -> float:
        model = cohort.mixed(weights)
        buffers = cohort.proxy.refreshed(model, cohort.buffers)
        score = -cohort.proxy.loss_of(model, buffers)
        if self.score == "accuracy" and isfinite(score):
            score = cohort.proxy.accuracy(model, buffers)
        return score if isfinite(score) else -inf
