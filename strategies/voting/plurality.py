"""Plurality vote of the clients' models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.voting.election import Election, count, plurality
from corymb.strategies.voting.finite_aggregation import spread_plurality
from corymb.strategies.voting.voting_rule import VotingRule


@dataclass(frozen=True)
class Plurality(VotingRule):
    """Levine & Feizi 2021, DPA: elects on each input the class that most voters score highest."""

    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """See `VotingRule.elect`. If `spread` is above 1, the certificates count buckets of clients."""
        return spread_plurality(scores, self.shifts) if self.spread > 1 else plurality(count(scores, seen))
