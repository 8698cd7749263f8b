"""Voters elect a class for each input, and a certificate says how many of them could lie without changing it.

Sources: DPA (Levine & Feizi 2021), Run-Off Election (Rezaei et al. 2023). Only the order of a voter's
scores counts: equal scores prefer the smaller class, scores that are not finite come last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ENTRIES = 1 << 24  # of comparisons between two classes at a time
BEYOND = 1 << 40  # a gap that nobody closes


class Election(NamedTuple):
    """`classes [N]`, and `certificates [N]`: so many voters may lie in whatever way, and the class stays."""

    classes: Tensor
    certificates: Tensor


class Count(NamedTuple):
    """`votes [N, C]` for each class, and `leads [N, C, C]`: how many more voters prefer the first class than not."""

    votes: Tensor
    leads: Tensor


def count(scores: Tensor, seen: Tensor | None = None) -> Count:
    """Count `scores [V, N, C]`. With `seen [V, C]` a voter is silent on classes that it has not seen.

    It then votes for the best of those that it has, and compares two classes only if it has seen both.
    """
    voters, _, classes = scores.shape
    seen = torch.ones(voters, classes, dtype=torch.bool) if seen is None else seen
    size = max(1, ENTRIES // (voters * classes * classes))
    parts = [_count(ranked(part), seen) for part in scores.split(size, dim=1)]
    return Count(torch.cat([part.votes for part in parts]), torch.cat([part.leads for part in parts]))


def _count(ranks: Tensor, seen: Tensor) -> Count:
    mine = torch.where(seen[:, None], ranks, ranks.shape[2])
    ballots = (mine == mine.amin(dim=2, keepdim=True)) & seen[:, None]
    both = seen[:, None, :, None] & seen[:, None, None, :]
    first, second = ranks[:, :, :, None], ranks[:, :, None, :]
    leads = ((first < second).long() - (first > second).long()) * both
    return Count(ballots.sum(dim=0), leads.sum(dim=0))


def ranked(scores: Tensor) -> Tensor:
    """Each voter's place of each class, 0 for the best, `[V, N, C]`: a strict order whatever the scores."""
    finite = torch.where(torch.isfinite(scores), scores, -torch.inf)
    return finite.argsort(dim=2, descending=True, stable=True).argsort(dim=2)


def plurality(counted: Count) -> Election:
    """The class with most votes, the smaller of equals (DPA)."""
    classes = counted.votes.argmax(dim=1)
    return Election(classes, one(gaps(counted.votes, classes)).amin(dim=1) - 1)


def run_off(counted: Count) -> Election:
    """The two classes with most votes meet in a second round that every voter takes part in."""
    winner, loser = winners(counted)
    lowest = gaps(counted.votes, winner).sort(dim=1).values  # of pairs that push the winner out, these two are least
    misses = both(lowest[:, 0], lowest[:, 1]) if lowest.shape[1] > 2 else torch.full_like(winner, BEYOND)
    reach = one(gaps(counted.votes, loser)).scatter(1, loser[:, None], 0)
    beat = one(duels(counted, winner))
    loses = torch.maximum(reach, beat).scatter(1, winner[:, None], BEYOND).amin(dim=1)
    return Election(winner, torch.minimum(misses, loses) - 1)


def finalists(votes: Tensor) -> tuple[Tensor, Tensor]:
    """The two classes with most `votes [N, C]`, the smaller of equals first, `[N]` each."""
    order = votes.argsort(dim=1, descending=True, stable=True)
    return order[:, 0], order[:, 1]


def winners(counted: Count) -> tuple[Tensor, Tensor]:
    """Who wins the final, the smaller class of equals, and who loses it, `[N]` each."""
    first, second = finalists(counted.votes)
    lead = counted.leads[torch.arange(len(first)), first, second]
    winner = torch.where(lead == 0, torch.minimum(first, second), torch.where(lead > 0, first, second))
    return winner, first + second - winner


def gaps(votes: Tensor, classes: Tensor) -> Tensor:
    """By how much each class must gain to come before `classes [N]` in the first round; `BEYOND` for itself."""
    own = votes.gather(1, classes[:, None])
    lead = own - votes + (torch.arange(votes.shape[1]) > classes[:, None])
    return lead.scatter(1, classes[:, None], BEYOND)


def duels(counted: Count, winner: Tensor) -> Tensor:
    """By how much each class must gain on `winner [N]` to beat it in the final, `[N, C]`."""
    classes = counted.votes.shape[1]
    return counted.leads[torch.arange(len(winner)), winner] + (torch.arange(classes) > winner[:, None])


def one(gaps: Tensor) -> Tensor:
    """How many voters close a gap: each can move it by two."""
    return (gaps.clamp(min=0) + 1) // 2


def both(one_gap: Tensor, other_gap: Tensor) -> Tensor:
    """How many voters close two gaps at once: each can move one of them by two and the other by one."""
    a, b = one_gap.clamp(min=0), other_gap.clamp(min=0)
    return torch.maximum(torch.maximum(one(a), one(b)), (a + b + 2) // 3)


def certified_accuracy(election: Election, labels: Tensor, budget: int) -> float:
    """The share of inputs whose label is elected, and stays so whatever `budget` voters do."""
    return float(((election.classes == labels) & (election.certificates >= budget)).double().mean())
