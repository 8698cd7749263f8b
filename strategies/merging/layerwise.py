"""Any sighted rule, applied to each tensor of the model separately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule, require_plain


@dataclass(frozen=True)
class Layerwise(SightedRule[None]):
    """Layer by layer: applies a sighted rule without memory to each tensor as if it were the whole model."""

    buffers = "median"
    preserves_consensus = False  # this and the next two depend on the inner rule
    shift_equivariant = False
    scale_equivariant = False

    rule: SightedRule[Any]

    def __post_init__(self) -> None:
        require_plain(rule=self.rule)

    def tolerates(self, clients: int) -> int:
        """Return the number that the inner rule tolerates."""
        return self.rule.tolerates(clients)

    def min_replies(self) -> int:
        """Return the number that the inner rule needs."""
        return self.rule.min_replies()

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Apply the rule to each layer. The notes are those of the last layer."""
        notes: dict[str, float] = {}

        def mix_layer(layer: Cohort) -> Tensor:
            mixed = self.rule.mix(layer, None)
            notes.update(mixed.notes)
            return mixed.vector

        return Mix(cohort.by_layer(mix_layer), notes=notes)
