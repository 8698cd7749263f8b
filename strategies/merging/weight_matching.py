"""Weight matching: hidden units are brought into the same order before models are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.round_models import RoundModels
from corymb.strategies.core.sighted import Mix, SightedRule, require_plain
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
    that was right: `mix` raises `ValueError` if the origin, reordered like a client's model, has other outputs. A
    client whose own model then has other outputs, as one with extreme weights, is left out; the note "dropped" has
    their number. On the same inputs, BatchNorm's statistics are estimated again.
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
        if self.merge_rule is not None:
            require_plain(merge_rule=self.merge_rule)

    def min_replies(self) -> int:
        """Return the number that the rule which merges needs."""
        return 1 if self.merge_rule is None else self.merge_rule.min_replies()

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Match every model to the reference, then merge the models."""
        axes = layer_axes(cohort.layout)
        reference = cohort.origin if self.reference == "origin" else cohort.models[0]
        ordered, kept = [], []
        for row, (node, model) in enumerate(zip(cohort.nodes, cohort.models, strict=True)):
            order = match(cohort.layout, reference, model, axes, self.seed)
            as_client = permuted(cohort.layout, cohort.origin, order, axes)
            if not _has_same_outputs(cohort.proxy, cohort.origin, as_client, cohort.buffers):
                raise ValueError(
                    f"Reordering the hidden units like those of {node} changes the outputs of the model; weight "
                    "matching needs a plain chain of layers, defined in the order in which they are called."
                )
            reordered = permuted(cohort.layout, model, order, axes)
            if _has_same_outputs(cohort.proxy, model, reordered, cohort.client_buffers[row]):
                ordered.append(reordered)
                kept.append(row)
        dropped = {"dropped": float(len(cohort.nodes) - len(kept))} if len(kept) < len(cohort.nodes) else {}
        if len(kept) < self.min_replies():
            return Mix(cohort.origin, notes=dropped)
        matched = cohort.subset(kept, RoundModels.of_matrix(torch.stack(ordered)))
        mixed: Mix[None] = Mix(matched.mixed(matched.shares), weights=matched.shares)
        if self.merge_rule is not None:
            mixed = self.merge_rule.mix(matched, None)
        weights = mixed.weights
        if weights is not None:
            weights = torch.zeros_like(cohort.examples).index_copy(0, torch.tensor(kept), weights.double())
        return replace(mixed, weights=weights, notes={**mixed.notes, **dropped})


def _has_same_outputs(proxy: Proxy, model: Tensor, reordered: Tensor, buffers: Tensor) -> bool:
    """Return whether a model and the same model with its units reordered have the same outputs."""
    rows = torch.arange(min(PROBES, len(proxy.inputs)))
    with torch.no_grad():
        before, after = (
            proxy.outputs(vector, buffers, rows, batch_statistics=True).double() for vector in (model, reordered)
        )
    return bool((before - after).abs().max() <= TOLERANCE * before.abs().max())
