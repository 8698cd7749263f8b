"""Any sighted rule, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule


@dataclass(frozen=True)
class Layerwise(SightedRule[None]):
    """Layer by layer: a sighted rule without memory, used on each tensor of the model as if it were the whole."""

    buffers = "median"
    unanimous = False  # these depend on the rule
    shift_equivariant = False
    scale_equivariant = False

    rule: SightedRule[Any]

    def __post_init__(self) -> None:
        if self.rule.initial() is not None or self.rule.needs_proxy:
            raise ValueError(f"rule = {self.rule} keeps a memory or needs proxy data; layers need a rule without.")

    def tolerates(self, clients: int) -> int:
        """As the rule does."""
        return self.rule.tolerates(clients)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """The rule's result for every layer; its notes are those of the last."""
        notes: dict[str, float] = {}

        def of_layer(layer: Cohort) -> Tensor:
            mixed = self.rule.mix(layer, None)
            notes.update(mixed.notes)
            return mixed.vector

        return Mix(cohort.by_layer(of_layer), notes=notes)
