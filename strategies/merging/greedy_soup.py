"""Greedy soup: the mean of those models that improve it."""

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
    """Wortsman et al. 2022, GreedySoup: adds models to the mean one by one, best first, and keeps those that help.

    A model is kept if the mean with it scores better on the server's proxy data than the best mean so far. `score` is
    "accuracy" or "loss" (lower is better). Models with equal scores are tried in the order of their names. With
    `mean`, the mean weighted by examples is also a candidate. (A uniform soup is FedAvg with `by_examples = false`.)
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
        """Build the soup: a mean of candidates, each of which is a row of weights of the clients' models."""
        candidates = list(torch.eye(len(cohort.nodes), dtype=torch.float64))
        if self.mean:
            candidates.append(cohort.shares)
        scores = [self._score(cohort, weights) for weights in candidates]
        order = sorted(range(len(candidates)), key=lambda index: -scores[index])
        ingredients, best = [candidates[order[0]]], scores[order[0]]
        for index in order[1:]:
            score = self._score(cohort, torch.stack([*ingredients, candidates[index]]).mean(dim=0))
            if score > best:
                ingredients, best = [*ingredients, candidates[index]], score
        weights = torch.stack(ingredients).mean(dim=0)
        return Mix(cohort.mixed(weights), weights=weights, notes={"ingredients": len(ingredients)})

    def _score(self, cohort: Cohort, weights: Tensor) -> float:
        model = cohort.mixed(weights)
        buffers = cohort.proxy.refreshed(model, cohort.buffers)
        score = -cohort.proxy.loss_of(model, buffers)
        if self.score == "accuracy" and isfinite(score):
            score = cohort.proxy.accuracy(model, buffers)
        return score if isfinite(score) else -inf
