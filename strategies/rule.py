"""Rules: what one round's replies become. The signature of a rule is the promise of what it looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from corymb.strategies.cohort import Cohort
from corymb.strategies.fold import Fold
from corymb.strategies.layout import Model, joined
from corymb.strategies.reply import Reply, Report

__all__ = [
    "BlindRule",
    "Cohort",
    "ElectingRule",
    "Electorate",
    "Outcome",
    "Reply",
    "Report",
    "Rule",
    "SightedRule",
]

M = TypeVar("M")  # memory: None, or a frozen dataclass of scalars, strings, tuples and tensors


class Outcome(NamedTuple, Generic[M]):
    """A round's new model, the rule's new memory, and how much each node counted (where that is known)."""

    model: Model
    memory: M
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Rule(ABC, Generic[M]):
    """A frozen dataclass whose fields are its settings; what changes over rounds is `memory`, a value."""

    kind: ClassVar[str]
    privacy_modes: ClassVar[tuple[str, ...]] = ("clear",)

    def initial(self) -> M:
        """The memory before the first round."""
        return None  # type: ignore[return-value]  # right for every rule whose memory is None

    @abstractmethod
    def aggregate(self, origin: Model, replies: Iterable[Reply], memory: M, known: Collection[str] = ()) -> Outcome[M]:
        """Turn the replies to `origin` into the next model; written once per kind of rule.

        `replies` may be empty, holds at most one reply per node and is read once. `known` names all
        sites of the federation, absent ones included. Nothing that is passed in is changed.
        """


class BlindRule(Rule[M]):
    """Weighs a reply without seeing any model: it streams in constant memory and can sum under masks.

    The model moves by `scale * sum(weight * (reply - origin))`.
    """

    kind = "blind"
    privacy_modes = ("clear", "masked")

    @abstractmethod
    def weight(self, report: Report, memory: M) -> float:
        """How much this reply counts; finite."""

    def scale(self, total: float, reports: Collection[Report], known: Collection[str], memory: M) -> float:
        """What the sum is multiplied by; by default the weights, whose sum is `total`, are made to sum to one."""
        return 1 / total if total else 0.0

    def after(self, reports: Collection[Report], known: Collection[str], memory: M) -> M:
        """The memory after a round in which `reports` took part."""
        return memory

    @final
    def aggregate(self, origin: Model, replies: Iterable[Reply], memory: M, known: Collection[str] = ()) -> Outcome[M]:
        """See `Rule.aggregate`."""
        fold = Fold(origin)
        reports, weights = [], {}
        for reply in replies:
            weight = self.weight(reply.report, memory)
            fold.add(reply, weight)
            reports.append(reply.report)
            weights[reply.report.node] = weight
            del reply  # so that the next one may take its memory
        known = {*known, *weights}
        scale = self.scale(fold.total, reports, known, memory)
        model = fold.model(scale)
        memory = self.after(reports, known, memory)
        return Outcome(model, memory, {node: weight * scale for node, weight in sorted(weights.items())})


class SightedRule(Rule[M]):
    """Sees every model of the round at once."""

    kind = "sighted"
    robust: ClassVar[bool] = False  # withstands hostile models: float buffers then take the median, not the mean

    @abstractmethod
    def mix(self, cohort: Cohort, memory: M) -> tuple[Tensor, M]:
        """The next parameters `[P]`, and the next memory. The cohort has at least one reply."""

    @final
    def aggregate(self, origin: Model, replies: Iterable[Reply], memory: M, known: Collection[str] = ()) -> Outcome[M]:
        """See `Rule.aggregate`."""
        ordered = sorted(replies, key=lambda reply: reply.report.node)
        del replies
        if not ordered:
            return Outcome(origin, memory, {})
        buffers = _buffers(origin, ordered, self.robust)
        cohort = Cohort.of(origin, ordered)
        vector, memory = self.mix(cohort, memory)
        return Outcome(origin.moved(vector.to(origin.parameters.dtype), buffers), memory, cohort.weights_of(vector))


def _buffers(origin: Model, replies: list[Reply], robust: bool) -> Tensor:
    """The float buffers `[B]` of a round: their mean by size, or their median where the rule is robust."""
    rows = torch.stack([reply.buffers.double() for reply in replies])
    examples = torch.tensor([float(reply.report.examples) for reply in replies], dtype=torch.float64)
    if robust:
        buffers = rows.sort(dim=0).values[[(len(rows) - 1) // 2, len(rows) // 2]].mean(dim=0)
    elif examples.sum() > 0:
        buffers = examples @ rows / examples.sum()
    else:
        return origin.buffers
    return buffers.to(origin.buffers.dtype)


@dataclass(frozen=True)
class Electorate:
    """The newest model of each voter: `models [V, P]`, one row per name in `nodes`."""

    nodes: tuple[str, ...] = ()
    models: Tensor | None = None


class ElectingRule(Rule[Electorate]):
    """Keeps every site's model, averages none, and lets them vote on each input.

    The models live in the memory; the global model stays as it was.
    """

    kind = "electing"

    def initial(self) -> Electorate:
        """Nobody has voted yet."""
        return Electorate()

    @abstractmethod
    def elect(self, scores: Tensor) -> Tensor:
        """The elected classes `[N]` from the voters' `scores [V, N, C]`."""

    @final
    def aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: Electorate, known: Collection[str] = ()
    ) -> Outcome[Electorate]:
        """See `Rule.aggregate`."""
        rows = {} if memory.models is None else dict(zip(memory.nodes, memory.models, strict=True))
        rows |= {reply.report.node: joined(reply.parts, origin.parameters.dtype) for reply in replies}
        if not rows:
            return Outcome(origin, memory, {})
        nodes = tuple(sorted(rows))
        return Outcome(origin, Electorate(nodes, torch.stack([rows[node] for node in nodes])), {})
