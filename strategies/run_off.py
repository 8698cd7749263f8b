"""Run-off election among the sites' models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.electing import ElectingRule
from corymb.strategies.election import Election, count, run_off
from corymb.strategies.finite_aggregation import spread_run_off


@dataclass(frozen=True)
class RunOff(ElectingRule):
    """Rezaei et al. 2023, Run-Off Election: the two classes with most first votes meet in a second round."""

    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """See `ElectingRule.elect`; certificates count buckets of sites where `spread` is above one."""
        return spread_run_off(scores, self.shifts) if self.spread > 1 else run_off(count(scores, seen))
