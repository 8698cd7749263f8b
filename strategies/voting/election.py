"""Elections of a class for each input, with certificates of how many corrupted voters a result withstands.

Sources: DPA (Levine & Feizi 2021), Run-Off Election (Rezaei et al. 2023). Only the order of a voter's scores matters.
Of equal scores, the smaller class ranks first; scores that are not finite rank last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_COMPARISONS = 1 << 24  # comparisons of two classes in one step
UNREACHABLE = 1 << 40  # a gap that no number of voters can close


class Election(NamedTuple):
    """The elected `classes [N]` and their `certificates [N]`.

    A certificate is a number of voters that may be corrupted in any way without changing the elected class.
    """

    classes: Tensor
    certificates: Tensor


class Count(NamedTuple):
    """The counted votes of an election.

    `votes [N, C]` are the votes for each class. `leads [N, C, C]` is the number of voters that prefer the first class
    to the second, minus the number that prefer the second to the first.
    """

    votes: Tensor
    leads: Tensor


def count(scores: Tensor, seen: Tensor | None = None) -> Count:
    """Count the votes of `scores [V, N, C]`. With `seen [V, C]` a voter abstains on classes that it has not seen.

    The voter then votes for the best class that it has seen, and compares two classes only if it has seen both.
    """
    voters, _, classes = scores.shape
    seen = torch.ones(voters, classes, dtype=torch.bool) if seen is None else seen
    size = max(1, MAX_COMPARISONS // (voters * classes * classes))
    parts = [_count_ranks(ranks(part), seen) for part in scores.split(size, dim=1)]
    return Count(torch.cat([part.votes for part in parts]), torch.cat([part.leads for part in parts]))


def _count_ranks(ranks: Tensor, seen: Tensor) -> Count:
    seen_ranks = torch.where(seen[:, None], ranks, ranks.shape[2])
    ballots = (seen_ranks == seen_ranks.amin(dim=2, keepdim=True)) & seen[:, None]
    seen_both = seen[:, None, :, None] & seen[:, None, None, :]
    first, second = ranks[:, :, :, None], ranks[:, :, None, :]
    leads = ((first < second).long() - (first > second).long()) * seen_both
    return Count(ballots.sum(dim=0), leads.sum(dim=0))


def ranks(scores: Tensor) -> Tensor:
    """Return each voter's rank of each class, 0 for the best, `[V, N, C]`. Ranks are distinct for any scores."""
    finite = torch.where(torch.isfinite(scores), scores, -torch.inf)
    return finite.argsort(dim=2, descending=True, stable=True).argsort(dim=2)


def plurality(counted: Count) -> Election:
    """Elect the class with the most votes, the smaller class in a tie (DPA)."""
    classes = counted.votes.argmax(dim=1)
    return Election(classes, voters_to_close(vote_gaps(counted.votes, classes)).amin(dim=1) - 1)


def run_off(counted: Count) -> Election:
    """Elect one of the two classes with the most votes, in a final in which all voters vote (Run-Off Election).

    The certificate is one less than the fewest voters that make the winner miss the final or lose it.
    """
    winner, loser = final_result(counted)
    lowest = (
        vote_gaps(counted.votes, winner).sort(dim=1).values
    )  # two classes with the least gaps can displace the winner
    misses = (
        voters_to_close_two(lowest[:, 0], lowest[:, 1]) if lowest.shape[1] > 2 else torch.full_like(winner, UNREACHABLE)
    )
    reach = voters_to_close(vote_gaps(counted.votes, loser)).scatter(1, loser[:, None], 0)
    beat = voters_to_close(final_gaps(counted, winner))
    loses = torch.maximum(reach, beat).scatter(1, winner[:, None], UNREACHABLE).amin(dim=1)
    return Election(winner, torch.minimum(misses, loses) - 1)


def finalists(votes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two classes with the most `votes [N, C]`, `[N]` each; in a tie, the smaller class comes first."""
    order = votes.argsort(dim=1, descending=True, stable=True)
    return order[:, 0], order[:, 1]


def final_result(counted: Count) -> tuple[Tensor, Tensor]:
    """Return the winner and the loser of the final, `[N]` each; the smaller class wins a tie."""
    first, second = finalists(counted.votes)
    lead = counted.leads[torch.arange(len(first)), first, second]
    winner = torch.where(lead == 0, torch.minimum(first, second), torch.where(lead > 0, first, second))
    return winner, first + second - winner


def vote_gaps(votes: Tensor, classes: Tensor) -> Tensor:
    """Return by how many votes each class must gain on `classes [N]` to rank before it in the first round, `[N, C]`.

    The entry of the class itself is `UNREACHABLE`.
    """
    own_votes = votes.gather(1, classes[:, None])
    gaps = own_votes - votes + (torch.arange(votes.shape[1]) > classes[:, None])
    return gaps.scatter(1, classes[:, None], UNREACHABLE)


def final_gaps(counted: Count, winner: Tensor) -> Tensor:
    """Return by how many votes each class must gain on `winner [N]` to beat it in the final, `[N, C]`."""
    classes = counted.votes.shape[1]
    return counted.leads[torch.arange(len(winner)), winner] + (torch.arange(classes) > winner[:, None])


def voters_to_close(gaps: Tensor) -> Tensor:
    """Return how many corrupted voters close each gap; one voter changes a gap by at most two."""
    return (gaps.clamp(min=0) + 1) // 2


def voters_to_close_two(one_gap: Tensor, other_gap: Tensor) -> Tensor:
    """Return how many corrupted voters close both gaps; one voter changes one gap by two and the other by one."""
    a, b = one_gap.clamp(min=0), other_gap.clamp(min=0)
    return torch.maximum(torch.maximum(voters_to_close(a), voters_to_close(b)), (a + b + 2) // 3)


def certified_accuracy(election: Election, labels: Tensor, budget: int) -> float:
    """Return the share of inputs whose label is elected with a certificate of at least `budget`."""
    return float(((election.classes == labels) & (election.certificates >= budget)).double().mean())
