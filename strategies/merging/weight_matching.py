"""Weight matching: hidden units are brought into the same order before models are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.round_models import RoundModels
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import one_of
from corymb.strategies.merging.permutation import layer_axes, match, permuted

PROBES = 16  # proxy examples on which outputs are compared
TOLERANCE = 1e-3  # of the largest output; float32 sums in another order differ by less


@dataclass(frozen=True)
class WeightMatching(SightedRule[None]):
    """Ainsworth et al. 2023, weight matching: reorders the hidden units of each model to match one, then merges.

    Use it for clients that start from different initial models; with a common initial model there is nothing to gain.
    `reference` is the model to match: "origin", or "first" for the first client by name. `merge_rule` is the sighted
    rule without memory that merges the models (default: the mean weighted by examples).

    The rule finds the units from names and shapes, for a plain chain of layers. The server's proxy inputs show whether
    that was right: `mix` raises `ValueError` if a reordered model has other outputs. On the same inputs, BatchNorm's
    statistics are estimated again.
    """

    needs_proxy = True
    buffers = "proxy"
    preserves_consensus = False  # this depends on the rule that merges
    scale_equivariant = False  # another scale or shift may give other permutations
    shift_equivariant = False

    reference: str = "first"
    merge_rule: SightedRule[Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(("origin", "first"), reference=self.reference)
        if self.merge_rule is not None and (self.merge_rule.initial() is not None or self.merge_rule.needs_proxy):
            raise ValueError(
                f"merge_rule = {self.merge_rule} keeps a memory or needs proxy data; use a rule that does neither."
            )

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Match every model to the reference, then merge the models."""
        axes = layer_axes(cohort.layout)
        reference = cohort.origin if self.reference == "origin" else cohort.models[0]
        ordered = [
            permuted(cohort.layout, model, match(cohort.layout, reference, model, axes, self.seed), axes)
            for model in cohort.models
        ]
        for node, model, reordered, buffers in zip(
            cohort.nodes, cohort.models, ordered, cohort.client_buffers, strict=True
        ):
            _require_same_outputs(cohort.proxy, node, model, reordered, buffers)
        matched = replace(cohort, round_models=RoundModels.of_matrix(torch.stack(ordered)))
        if self.merge_rule is not None:
            return self.merge_rule.mix(matched, None)
        return Mix(matched.mixed(cohort.shares), weights=cohort.shares)


def _require_same_outputs(proxy: Proxy, node: str, model: Tensor, reordered: Tensor, buffers: Tensor) -> None:
    """Raise `ValueError` if a model and the same model with its units reordered differ in their outputs."""
    rows = torch.arange(min(PROBES, len(proxy.inputs)))
    with torch.no_grad():
        before, after = (
            proxy.outputs(vector, buffers, rows, batch_statistics=True).double() for vector in (model, reordered)
        )
    if not (before - after).abs().max() <= TOLERANCE * before.abs().max():
        raise ValueError(
            f"Reordering the hidden units of the model of {node} changes its outputs; weight matching needs a plain "
            "chain of layers, defined in the order in which they are called."
        )
