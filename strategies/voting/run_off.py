"""Run-off election among the sites' models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.voting.election import Election, count, run_off
from corymb.strategies.voting.finite_aggregation import spread_run_off
from corymb.strategies.voting.voting_rule import VotingRule


@dataclass(frozen=True)
class RunOff(VotingRule):
    """Rezaei et al. 2023, Run-Off Election: the two classes with most first votes meet in a second round."""

    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """See `VotingRule.elect`; certificates count buckets of sites where `spread` is above one."""
        return spread_run_off(scores, self.shifts) if self.spread > 1 else run_off(count(scores, seen))
