"""Units put into one order before models are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.round_models import RoundModels
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import one_of
from corymb.strategies.merging.permutation import layer_axes, match, permuted


@dataclass(frozen=True)
class WeightMatching(SightedRule[None]):
    """Ainsworth et al. 2023, weight matching: reorder the units of each model as those of one, then merge.

    For sites that began from different initial models; from a common one there is nothing to gain. `reference` is
    the "origin", or the "first" site by name. `then` is a sighted rule without memory that merges, by
    default the mean by examples. BatchNorm's statistics need proxy data to follow.
    """

    buffers = "proxy"
    unanimous = False  # that depends on the rule that merges
    scale_equivariant = False  # the order found may be another
    shift_equivariant = False

    reference: str = "first"
    then: SightedRule[Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(("origin", "first"), reference=self.reference)
        if self.then is not None and (self.then.initial() is not None or self.then.needs_proxy):
            raise ValueError(f"then = {self.then} keeps a memory or needs proxy data; matching takes a rule without.")

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Match every model to the reference and merge them."""
        if cohort.buffers.numel():
            _ = cohort.proxy  # without which the statistics would stay in the old order
        axes = layer_axes(cohort.layout)
        reference = cohort.origin if self.reference == "origin" else cohort.models[0]
        ordered = [
            permuted(cohort.layout, model, match(cohort.layout, reference, model, axes, self.seed), axes)
            for model in cohort.models
        ]
        matched = replace(cohort, round_models=RoundModels.of_matrix(torch.stack(ordered)))
        if self.then is not None:
            return self.then.mix(matched, None)
        return Mix(matched.mixed(cohort.shares), weights=cohort.shares)
