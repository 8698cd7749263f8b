"""Certificates of Finite Aggregation (Wang et al. 2022), where one bucket of clients contributes to several voters.

There are as many buckets as voters. Bucket h contributes to the voters (h + s) mod V, for each s in `shifts`. The
certificates count buckets instead of voters. The power of a bucket over a gap is the most by which its voters can
change the gap; the fewest buckets that close the gap are those with the most power.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from corymb.strategies.voting.election import (
    UNREACHABLE,
    Election,
    count,
    final_gaps,
    final_result,
    finalists,
    ranks,
    vote_gaps,
)

Shifts = tuple[int, ...]


def spread_plurality(scores: Tensor, shifts: Shifts) -> Election:
    """Elect by plurality among `scores [V, N, C]`; the certificates count buckets."""
    votes = count(scores).votes
    winner, _ = finalists(votes)
    return Election(winner, _buckets_to_overtake(votes, winner, _first_choices(scores), shifts).amin(dim=1) - 1)


def spread_run_off(scores: Tensor, shifts: Shifts) -> Election:
    """Elect by run-off among `scores [V, N, C]`; the certificates count buckets."""
    counted, first_choices, all_ranks = count(scores), _first_choices(scores), ranks(scores)
    votes, (winner, loser) = counted.votes, final_result(counted)
    classes, gaps, votes_winner = range(votes.shape[1]), vote_gaps(votes, winner), _entries_of(first_choices, winner)
    # The winner misses the final if two other classes rank before it.
    single = _buckets_to_overtake(votes, winner, first_choices, shifts)
    fewest = torch.full_like(winner, UNREACHABLE)
    for a, b in combinations(classes, 2):
        joint_gap = gaps[:, a].clamp(min=0) + gaps[:, b].clamp(min=0)
        pair = _buckets_to_close(
            joint_gap, 1 + 2 * votes_winner - first_choices[:, :, a] - first_choices[:, :, b], shifts
        )
        pair = torch.maximum(pair, torch.maximum(single[:, a], single[:, b]))
        fewest = torch.where((winner == a) | (winner == b), fewest, torch.minimum(fewest, pair))
    # Or the winner loses the final to a class that reaches the final.
    reach = _buckets_to_overtake(votes, loser, first_choices, shifts).scatter(1, loser[:, None], 0)
    duel_gaps, winner_ranks = final_gaps(counted, winner), _entries_of(all_ranks, winner)
    for c in classes:
        beaten = torch.maximum(
            reach[:, c], _buckets_to_close(duel_gaps[:, c], 2 * (winner_ranks < all_ranks[:, :, c]).long(), shifts)
        )
        fewest = torch.where(winner == c, fewest, torch.minimum(fewest, beaten))
    return Election(winner, fewest - 1)


def _first_choices(scores: Tensor) -> Tensor:
    """Return 1 for the class that a voter ranks first and 0 for the others, `[V, N, C]`."""
    return (ranks(scores) == 0).long()


def _entries_of(table: Tensor, classes: Tensor) -> Tensor:
    """Return the entries of `table [V, N, C]` for `classes [N]`, `[V, N]`."""
    return table[:, torch.arange(len(classes)), classes]


def _buckets_to_overtake(votes: Tensor, classes: Tensor, first_choices: Tensor, shifts: Shifts) -> Tensor:
    """Return how many buckets each class needs to rank before `classes [N]` in votes, `[N, C]`."""
    gaps, own_votes = vote_gaps(votes, classes), _entries_of(first_choices, classes)
    buckets = [
        _buckets_to_close(gaps[:, c], 1 + own_votes - first_choices[:, :, c], shifts) for c in range(votes.shape[1])
    ]
    return torch.stack(buckets, dim=1).scatter(1, classes[:, None], UNREACHABLE)


def _buckets_to_close(gap: Tensor, power: Tensor, shifts: Shifts) -> Tensor:
    """Return the fewest buckets that close `gap [N]`, given the `power [V, N]` of each voter over it."""
    bucket_power = torch.stack([power.roll(-shift, dims=0) for shift in shifts]).sum(dim=0)
    closed = bucket_power.sort(dim=0, descending=True).values.cumsum(dim=0)
    return torch.where(gap <= 0, 0, (closed < gap).sum(dim=0) + 1)
