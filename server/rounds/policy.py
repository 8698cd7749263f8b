"""Limits on what one reply may do to the model: the length of its update, its weight, and how often it may offend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf, isfinite, sqrt
from statistics import median
from typing import Literal

import torch

from corymb.server.rounds.guard_memory import GuardMemory
from corymb.server.rounds.rejections import Code, Rejection
from corymb.strategies import Model, Reply, Report
from corymb.strategies.core.rows import SingleRow

LEAST_NORMS = 5  # norms that must be known before they limit others
OFFENCES = frozenset(Code) - {Code.OFFLINE, Code.ERROR, Code.UNRECEIVED, Code.QUARANTINED}


@dataclass(frozen=True)
class Policy:
    """Limits on each reply. By default there are none.

    The update of a reply, its model minus the model that was sent, may have an L2 norm of at most `max_norm`, and of
    at most `max_norm_ratio` times the median norm of the admitted updates of the last rounds.

    A reply counts with at most `max_examples` examples, and with at most those in `enrolled` for its site. Between two
    rounds, the number may grow by the factor `max_growth`. A reply beyond a limit is shortened to it (`excess="clip"`)
    or rejected ("reject"). With `max_share`, no reply has more than this share of the examples of a round; all replies
    of a round are then held in memory at once.

    With `max_strikes`, a site with so many rejected replies is left out for `quarantine_rounds` rounds. Errors and
    absences are no offences.
    """

    max_norm: float = inf
    max_norm_ratio: float = inf
    max_examples: float = inf
    enrolled: Mapping[str, float] = field(default_factory=dict)
    max_growth: float = inf
    max_share: float = 1.0
    excess: Literal["clip", "reject"] = "clip"
    max_strikes: int = 0
    quarantine_rounds: int = 10

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_norm_ratio", "max_examples", "max_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use a number above 0.")
        if not self.max_growth >= 1:
            raise ValueError(f"max_growth is {self.max_growth}; use a factor of at least 1.")

    def check(self, reply: Reply, sent: Model, memory: GuardMemory) -> tuple[Reply | Rejection, float | None]:
        """Return `reply` within the limits, or its rejection; and the norm of its update, None if it has no limit.

        `sent` is the model that the node received.
        """
        admitted = self._with_few_examples(reply, memory)
        if isinstance(admitted, Rejection):
            return admitted, None
        return self._with_short_update(admitted, sent, memory)

    def _with_few_examples(self, reply: Reply, memory: GuardMemory) -> Reply | Rejection:
        report = reply.report
        before = memory.examples.get(report.node)
        limit = min(
            self.max_examples,
            self.enrolled.get(report.node, inf),
            inf if before is None else max(1.0, before) * self.max_growth,
        )
        if report.examples <= limit:
            return reply
        if self.excess == "reject":
            reason = f"{report.node}: it reports {report.examples:g} examples, more than its limit of {limit:g}."
            return Rejection(report.node, Code.EXAMPLES, reason)
        return replace(reply, report=replace(report, examples=limit))

    def _with_short_update(
        self, reply: Reply, sent: Model, memory: GuardMemory
    ) -> tuple[Reply | Rejection, float | None]:
        if not (isfinite(self.max_norm) or isfinite(self.max_norm_ratio)):
            return reply, None
        limit = self.max_norm
        if len(memory.norms) >= LEAST_NORMS:
            limit = min(limit, self.max_norm_ratio * median(memory.norms))
        norm = sqrt(float(SingleRow(reply.parts).squared_distances(sent.parameters)()[0]))
        if norm <= limit:
            return reply, norm
        node = reply.report.node
        if self.excess == "reject":
            reason = f"{node}: its update has the norm {norm:g}, more than the limit of {limit:g}."
            return Rejection(node, Code.NORM, reason), norm
        received = reply.vector(sent.parameters.dtype)
        return replace(reply, rows=SingleRow((torch.lerp(sent.parameters, received, limit / norm),)), row=0), limit


def with_share(replies: list[Reply], share: float) -> list[Reply]:
    """Return `replies` with numbers of examples of which none is more than the `share` of their sum.

    Each number is lowered to the same cap, the highest one that achieves this. If there is none, because there are
    fewer than 1 / share replies with examples, all have the number of the smallest.
    """
    numbers = sorted((reply.report.examples for reply in replies if reply.report.examples > 0), reverse=True)
    if share >= 1 or not numbers:
        return replies
    cap, rest = numbers[-1], sum(numbers)
    for capped, number in enumerate(numbers):  # the `capped` largest numbers are lowered to the cap
        if number <= share * (capped * number + rest):
            cap = number if capped == 0 else max(number, share * rest / (1 - share * capped))
            break
        rest -= number
    return [_at_most(reply, cap) for reply in replies]


def _at_most(reply: Reply, examples: float) -> Reply:
    report: Report = reply.report
    return reply if report.examples <= examples else replace(reply, report=replace(report, examples=examples))
