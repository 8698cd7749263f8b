"""Plurality among the sites' models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.voting.election import Election, count, plurality
from corymb.strategies.voting.finite_aggregation import spread_plurality
from corymb.strategies.voting.voting_rule import VotingRule


@dataclass(frozen=True)
class Plurality(VotingRule):
    """Levine & Feizi 2021, DPA: on each input, the class that most voters score highest."""

    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """See `VotingRule.elect`; certificates count buckets of sites where `spread` is above one."""
        return spread_plurality(scores, self.shifts) if self.spread > 1 else plurality(count(scores, seen))
