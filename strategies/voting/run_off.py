"""Run-off election of the clients' models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.voting.election import Election, count, run_off
from corymb.strategies.voting.finite_aggregation import spread_run_off
from corymb.strategies.voting.voting_rule import VotingRule


@dataclass(frozen=True)
class RunOff(VotingRule):
    """Rezaei et al. 2023, Run-Off Election: all voters decide between the two classes with the most votes."""

    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """See `VotingRule.elect`. If `spread` is above 1, the certificates count buckets of clients."""
        return spread_run_off(scores, self.shifts) if self.spread > 1 else run_off(count(scores, seen))
