"""Rules that keep every voter's model, average none, and let them vote on each input."""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from corymb.strategies.core.blind import WeightedSum
from corymb.strategies.core.layout import Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply, class_counts
from corymb.strategies.core.rule import Outcome, Rule
from corymb.strategies.core.validation import at_least
from corymb.strategies.voting.election import Election


@dataclass(frozen=True)
class Voters:
    """The voters' models: `models [R, P]` and `buffers [R, B]`, a row per name in `nodes`, oldest first.

    A voter with several rows is their sum. `seen [R, C]` counts the examples of each class, where sites tell;
    `rounds` have passed.
    """

    nodes: tuple[str, ...] = ()
    models: Tensor | None = None
    buffers: Tensor | None = None
    seen: Tensor | None = None
    rounds: int = 0


@dataclass(frozen=True)
class VotingRule(Rule[Voters]):
    """Keeps every voter's model, averages none, and lets them vote on each input.

    By default each site is a voter, trained from the first model, which stays as it is. It votes with the sum
    of the scores of its newest `versions` models (DPA*: several seeds for one voter). With `groups`, sites are
    put into so many groups by their names, and each group trains a model of its own by FedAvg: a hostile site
    spoils its group's vote only, in however many rounds. With `spread` d a site works for d groups in turn
    (Finite Aggregation). `abstain` keeps a voter silent on classes that it reports no example of.
    """

    kind = "voting"
    versions: int = 1
    groups: int = 0
    spread: int = 1
    abstain: bool = False

    def __post_init__(self) -> None:
        at_least(1, versions=self.versions, spread=self.spread)
        at_least(0, groups=self.groups)
        if self.groups and self.versions > 1:
            raise ValueError(f"versions = {self.versions} and groups = {self.groups} exclude each other; give one.")
        if self.spread > 1 and self.spread >= self.groups:
            raise ValueError(f"spread = {self.spread} needs more groups than that, not {self.groups}.")
        if self.spread > 1 and self.abstain:
            raise ValueError(f"abstain = True has no certificate with spread = {self.spread}; give one of them.")

    def initial(self) -> Voters:
        """Nobody has voted yet."""
        return Voters()

    @abstractmethod
    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """The election among the voters' `scores [V, N, C]`, who have `seen [V, C]` (default: everything)."""

    def vote(self, memory: Voters, proxy: Proxy) -> Election:
        """The voters' election on the examples of `proxy`. Raises `ValueError` before anybody has replied."""
        if memory.models is None or memory.buffers is None:
            raise ValueError("Nobody has replied yet, so there are no voters; run a round first.")
        voters = tuple(dict.fromkeys(memory.nodes))
        place = {voter: row for row, voter in enumerate(voters)}
        scores: list[Tensor | None] = [None] * len(voters)
        for node, model, buffers in zip(memory.nodes, memory.models, memory.buffers, strict=True):
            mine, before = proxy.scores(model, buffers), scores[place[node]]
            scores[place[node]] = mine if before is None else before + mine
        ballots, seen = torch.stack([s for s in scores if s is not None]), None
        if self.abstain and memory.seen is not None:
            newest = {node: row for row, node in enumerate(memory.nodes)}
            counts = memory.seen[[newest[voter] for voter in voters]]
            seen = torch.zeros(ballots.shape[0], ballots.shape[2], dtype=torch.bool)
            seen[:, : counts.shape[1]] = counts[:, : seen.shape[1]] > 0
            seen |= ~seen.any(dim=1, keepdim=True)  # who does not say what it has seen is not silent
        return self.elect(ballots, seen)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Which groups a bucket of sites works for, counted from its own; drawn once and for all."""
        return tuple(sorted(random.Random("shifts").sample(range(self.groups), self.spread))) if self.groups else (0,)

    def group_of(self, node: str, rounds: int) -> int:
        """The group that `node` works for after so many rounds: a matter of its name only, never of its data."""
        bucket = int.from_bytes(hashlib.sha256(node.encode()).digest()[:8]) % self.groups
        return (bucket + self.shifts[rounds % self.spread]) % self.groups

    def model_for(self, node: str, origin: Model, memory: Voters) -> Model:
        """The model of the node's group, the first model without groups."""
        return _of_group(self.group_of(node, memory.rounds), origin, memory) if self.groups else origin

    @final
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: Voters, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[Voters]:
        """The model that comes out is the origin; the voters' models are in the memory."""
        ordered = sorted(replies, key=lambda reply: reply.report.node)
        rows = self._by_group(origin, ordered, memory) if self.groups else self._by_site(origin, ordered, memory)
        if not rows:
            return Outcome(origin, replace(memory, rounds=memory.rounds + 1))
        nodes, models, buffers, seen = zip(*rows, strict=True)
        return Outcome(
            origin,
            Voters(nodes, torch.stack(models), torch.stack(buffers), _padded(seen), memory.rounds + 1),
        )

    def _by_site(self, origin: Model, replies: list[Reply], memory: Voters) -> list[Row]:
        rows = _rows(memory)
        for reply in replies:
            vector = reply.vector(origin.parameters.dtype)
            rows.append((reply.report.node, vector, reply.buffers, class_counts(reply.report)))
            mine = [row for row in rows if row[0] == reply.report.node]
            if len(mine) > self.versions:
                rows.pop(next(i for i, row in enumerate(rows) if row[0] == reply.report.node))
        return sorted(rows, key=lambda row: row[0])  # stable: a site's own stay in order

    def _by_group(self, origin: Model, replies: list[Reply], memory: Voters) -> list[Row]:
        rows = []
        for group in range(self.groups):
            mine = [reply for reply in replies if self.group_of(reply.report.node, memory.rounds) == group]
            before = _of_group(group, origin, memory)
            model = _mean(before, mine)
            counts = [class_counts(reply.report) for reply in mine]
            if memory.seen is not None:
                counts.append(memory.seen[group])
            rows.append((f"group-{group:04d}", model.parameters, model.buffers, _padded(counts).sum(dim=0)))
        return rows


Row = tuple[str, Tensor, Tensor, Tensor]  # name, parameters, buffers, examples of each class


def _mean(origin: Model, replies: list[Reply]) -> Model:
    """The mean of `replies`, weighed by their examples; the origin where there are none."""
    total = WeightedSum(origin)
    for reply in replies:
        total.add(reply, float(reply.report.examples))
    return total.model(1 / total.weight if total.weight else 0.0)


def _of_group(group: int, origin: Model, memory: Voters) -> Model:
    """The model that a group has reached."""
    if memory.models is None or memory.buffers is None:
        return origin
    return replace(origin, parameters=memory.models[group], buffers=memory.buffers[group])


def _rows(memory: Voters) -> list[Row]:
    if memory.models is None or memory.buffers is None or memory.seen is None:
        return []
    return list(zip(memory.nodes, memory.models, memory.buffers, memory.seen, strict=True))


def _padded(counts: Collection[Tensor]) -> Tensor:
    """Counts of classes, of any lengths, as one table `[n, C]`."""
    counts = list(counts) or [torch.zeros(0)]
    return torch.nn.utils.rnn.pad_sequence([c.double() for c in counts], batch_first=True)
