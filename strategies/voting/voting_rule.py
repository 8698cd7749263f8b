"""The base class of voting rules, which keep the model of every voter and let the models vote on each input."""

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
    """The voters' models: `models [R, P]` and `buffers [R, B]`, one row per name in `nodes`, oldest first.

    A voter with several rows votes with the sum of their scores. `seen [R, C]` is the number of examples of each
    class that the client reported. `rounds` is the number of past rounds.
    """

    nodes: tuple[str, ...] = ()
    models: Tensor | None = None
    buffers: Tensor | None = None
    seen: Tensor | None = None
    rounds: int = 0


@dataclass(frozen=True)
class VotingRule(Rule[Voters]):
    """A rule that keeps the model of every voter, averages none, and lets the models vote on each input.

    By default each client is a voter. It trains from the first model, which never changes, and votes with the sum of
    the scores of its newest `versions` models (DPA*: several seeds per voter). With `groups`, the rule divides the
    clients into this number of groups by their names, and each group trains its own model by FedAvg. A hostile client
    then spoils the vote of its own group only, in any number of rounds. With `spread` d, a client works for d groups
    in turn (Finite Aggregation). With `abstain`, a voter abstains on classes of which it reports no example.
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
            raise ValueError(f"versions is {self.versions} and groups is {self.groups}; set only one of them.")
        if self.spread > 1 and self.spread >= self.groups:
            raise ValueError(f"spread is {self.spread} and groups is {self.groups}; use more groups than spread.")
        if self.spread > 1 and self.abstain:
            raise ValueError(
                f"abstain is True and spread is {self.spread}; no certificate covers both, so set only one."
            )

    def initial(self) -> Voters:
        """Return an empty memory without voters."""
        return Voters()

    @abstractmethod
    def elect(self, scores: Tensor, seen: Tensor | None = None) -> Election:
        """Elect a class for each input from the voters' `scores [V, N, C]`.

        `seen [V, C]` says which classes each voter has seen (default: all); a voter abstains on the others.
        """

    def vote(self, memory: Voters, proxy: Proxy) -> Election:
        """Return the election on the examples of `proxy`. Raises `ValueError` if no client has replied yet."""
        if memory.models is None or memory.buffers is None:
            raise ValueError("No client has replied yet, so there are no voters; run a round first.")
        voters = tuple(dict.fromkeys(memory.nodes))
        index = {voter: row for row, voter in enumerate(voters)}
        scores: list[Tensor | None] = [None] * len(voters)
        for node, model, buffers in zip(memory.nodes, memory.models, memory.buffers, strict=True):
            model_scores, total = proxy.class_scores(model, buffers), scores[index[node]]
            scores[index[node]] = model_scores if total is None else total + model_scores
        ballots, seen = torch.stack([s for s in scores if s is not None]), None
        if self.abstain and memory.seen is not None:
            newest = {node: row for row, node in enumerate(memory.nodes)}
            counts = memory.seen[[newest[voter] for voter in voters]]
            seen = torch.zeros(ballots.shape[0], ballots.shape[2], dtype=torch.bool)
            seen[:, : counts.shape[1]] = counts[:, : seen.shape[1]] > 0
            seen |= ~seen.any(dim=1, keepdim=True)  # a voter that reports no class counts does not abstain
        return self.elect(ballots, seen)

    @property
    def shifts(self) -> tuple[int, ...]:
        """The groups that a bucket of clients works for, as offsets from its own number; the same in every run."""
        return tuple(sorted(random.Random("shifts").sample(range(self.groups), self.spread))) if self.groups else (0,)

    def group_of(self, node: str, rounds: int) -> int:
        """Return the group that `node` works for after `rounds` rounds. It depends on the name, not on data."""
        bucket = int.from_bytes(hashlib.sha256(node.encode()).digest()[:8]) % self.groups
        return (bucket + self.shifts[rounds % self.spread]) % self.groups

    def model_for(self, node: str, origin: Model, memory: Voters) -> Model:
        """Return the model of the node's group; without groups, the first model."""
        return _group_model(self.group_of(node, memory.rounds), origin, memory) if self.groups else origin

    @final
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: Voters, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[Voters]:
        """Return the origin as the next model; the memory holds the voters' models."""
        ordered = sorted(replies, key=lambda reply: reply.report.node)
        rows = self._group_rows(origin, ordered, memory) if self.groups else self._client_rows(origin, ordered, memory)
        if not rows:
            return Outcome(origin, replace(memory, rounds=memory.rounds + 1))
        nodes, models, buffers, seen = zip(*rows, strict=True)
        return Outcome(
            origin,
            Voters(nodes, torch.stack(models), torch.stack(buffers), _padded(seen), memory.rounds + 1),
        )

    def _client_rows(self, origin: Model, replies: list[Reply], memory: Voters) -> list[Row]:
        """Return the rows of the memory and of the replies; at most the newest `versions` rows of each client."""
        rows = _memory_rows(memory)
        for reply in replies:
            vector = reply.vector(origin.parameters.dtype)
            rows.append((reply.report.node, vector, reply.buffers, class_counts(reply.report)))
            client_rows = [row for row in rows if row[0] == reply.report.node]
            if len(client_rows) > self.versions:
                rows.pop(next(i for i, row in enumerate(rows) if row[0] == reply.report.node))
        return sorted(rows, key=lambda row: row[0])  # a stable sort keeps the rows of one client oldest first

    def _group_rows(self, origin: Model, replies: list[Reply], memory: Voters) -> list[Row]:
        """Return one row per group: its model after this round, and the class counts that its clients reported."""
        rows = []
        for group in range(self.groups):
            group_replies = [reply for reply in replies if self.group_of(reply.report.node, memory.rounds) == group]
            group_model = _group_model(group, origin, memory)
            model = _mean(group_model, group_replies)
            counts = [class_counts(reply.report) for reply in group_replies]
            if memory.seen is not None:
                counts.append(memory.seen[group])
            rows.append((f"group-{group:04d}", model.parameters, model.buffers, _padded(counts).sum(dim=0)))
        return rows


Row = tuple[str, Tensor, Tensor, Tensor]  # name, parameters, buffers, examples of each class


def _mean(origin: Model, replies: list[Reply]) -> Model:
    """Return the mean of `replies`, weighted by examples, or the origin if there are none."""
    total = WeightedSum(origin)
    for reply in replies:
        total.add(reply, float(reply.report.examples))
    return total.model(1 / total.weight if total.weight else 0.0)


def _group_model(group: int, origin: Model, memory: Voters) -> Model:
    """Return the current model of a group; the origin before the first round."""
    if memory.models is None or memory.buffers is None:
        return origin
    return replace(origin, parameters=memory.models[group], buffers=memory.buffers[group])


def _memory_rows(memory: Voters) -> list[Row]:
    if memory.models is None or memory.buffers is None or memory.seen is None:
        return []
    return list(zip(memory.nodes, memory.models, memory.buffers, memory.seen, strict=True))


def _padded(counts: Collection[Tensor]) -> Tensor:
    """Return class counts of different lengths as one table `[n, C]`, padded with zeros."""
    counts = list(counts) or [torch.zeros(0)]
    return torch.nn.utils.rnn.pad_sequence([c.double() for c in counts], batch_first=True)
