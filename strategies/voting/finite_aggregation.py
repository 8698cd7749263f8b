"""Certificates where one hostile bucket of clients reaches several voters (Finite Aggregation, Wang et al. 2022).

Client buckets are numbered like the voters, and bucket h works for the voters h + s mod V, s in `shifts`. A
certificate counts buckets: the fewest that close a gap are those with the most power over it.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from corymb.strategies.voting.election import BEYOND, Election, count, duels, finalists, gaps, ranked, winners

Shifts = tuple[int, ...]


def spread_plurality(scores: Tensor, shifts: Shifts) -> Election:
    """Plurality among `scores [V, N, C]`, certified in buckets."""
    votes = count(scores).votes
    winner, _ = finalists(votes)
    return Election(winner, _overtaken(votes, winner, _tops(scores), shifts).amin(dim=1) - 1)


def spread_run_off(scores: Tensor, shifts: Shifts) -> Election:
    """Run-off among `scores [V, N, C]`, certified in buckets."""
    counted, tops, places = count(scores), _tops(scores), ranked(scores)
    votes, (winner, loser) = counted.votes, winners(counted)
    classes, lead, mine = range(votes.shape[1]), gaps(votes, winner), _of(tops, winner)
    # The winner misses the final when two others come before it.
    alone = _overtaken(votes, winner, tops, shifts)
    fewest = torch.full_like(winner, BEYOND)
    for a, b in combinations(classes, 2):
        together = lead[:, a].clamp(min=0) + lead[:, b].clamp(min=0)
        pair = _cover(together, 1 + 2 * mine - tops[:, :, a] - tops[:, :, b], shifts)
        pair = torch.maximum(pair, torch.maximum(alone[:, a], alone[:, b]))
        fewest = torch.where((winner == a) | (winner == b), fewest, torch.minimum(fewest, pair))
    # Or it loses the final, to a class that must reach it first.
    reach = _overtaken(votes, loser, tops, shifts).scatter(1, loser[:, None], 0)
    duel, place = duels(counted, winner), _of(places, winner)
    for c in classes:
        beaten = torch.maximum(reach[:, c], _cover(duel[:, c], 2 * (place < places[:, :, c]).long(), shifts))
        fewest = torch.where(winner == c, fewest, torch.minimum(fewest, beaten))
    return Election(winner, fewest - 1)


def _tops(scores: Tensor) -> Tensor:
    """Whether each class is the voter's first, `[V, N, C]`."""
    return (ranked(scores) == 0).long()


def _of(table: Tensor, classes: Tensor) -> Tensor:
    """The entries of `table [V, N, C]` for `classes [N]`, `[V, N]`."""
    return table[:, torch.arange(len(classes)), classes]


def _overtaken(votes: Tensor, classes: Tensor, tops: Tensor, shifts: Shifts) -> Tensor:
    """How many buckets it takes for each class to come before `classes [N]` in votes, `[N, C]`."""
    lead, mine = gaps(votes, classes), _of(tops, classes)
    covers = [_cover(lead[:, c], 1 + mine - tops[:, :, c], shifts) for c in range(votes.shape[1])]
    return torch.stack(covers, dim=1).scatter(1, classes[:, None], BEYOND)


def _cover(gap: Tensor, power: Tensor, shifts: Shifts) -> Tensor:
    """The fewest buckets whose voters, with `power [V, N]`, close `gap [N]`."""
    buckets = torch.stack([power.roll(-shift, dims=0) for shift in shifts]).sum(dim=0)
    closed = buckets.sort(dim=0, descending=True).values.cumsum(dim=0)
    return torch.where(gap <= 0, 0, (closed < gap).sum(dim=0) + 1)
