"""Rules that see every model of the round at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from math import isfinite
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from corymb.strategies.cohort import Cohort
from corymb.strategies.layout import Model, joined
from corymb.strategies.proxy import Proxy
from corymb.strategies.ranks import median
from corymb.strategies.reply import Reply
from corymb.strategies.rule import M, Outcome, Rule


class SightedRule(Rule[M]):
    """Sees every model of the round at once.

    Float buffers never reach it: their "mean" is taken by size; a rule that withstands hostile models
    takes their "median"; "proxy" estimates BatchNorm's statistics anew on the server's own data, where there
    are such data, for rules whose models the sites' statistics do not fit.
    """

    kind = "sighted"
    buffers: ClassVar[Literal["mean", "median", "proxy"]] = "mean"
    screens: ClassVar[bool] = True  # with proxy data: leaves out models whose outputs on them are not finite
    acts_alone: ClassVar[bool] = False  # moves the model in a round without replies, too

    @abstractmethod
    def mix(self, cohort: Cohort, memory: M) -> tuple[Tensor, M]:
        """The next parameters `[P]`, and the next memory. The cohort has at least one reply, unless `acts_alone`."""

    @final
    def aggregate(
        self,
        origin: Model,
        replies: Iterable[Reply],
        memory: M,
        known: Collection[str] = (),
        proxy: Proxy | None = None,
    ) -> Outcome[M]:
        """See `Rule.aggregate`."""
        ordered = sorted(replies, key=lambda reply: reply.report.node)
        del replies
        if self.needs_proxy and proxy is None:
            raise ValueError(f"{type(self).__name__} needs proxy data at the server and there are none; give a proxy.")
        dropped = 0
        if self.needs_proxy and proxy is not None and self.screens:
            sound = [reply for reply in ordered if _is_finite(reply, origin, proxy)]
            dropped, ordered = len(ordered) - len(sound), sound
        if not ordered and not self.acts_alone:
            return Outcome(origin, memory, notes={"dropped": dropped} if dropped else {})
        buffers = self._buffers(origin, ordered)
        everyone = {*known, *(reply.report.node for reply in ordered)}
        cohort = Cohort.of(origin, ordered, tuple(sorted(everyone)), proxy)
        vector, memory = self.mix(cohort, memory)
        if dropped:
            cohort.notes["dropped"] = dropped
        if vector is origin.parameters:  # the rule chose to change nothing
            return Outcome(origin, memory, notes=_finite(cohort.notes))
        vector = vector.to(origin.parameters.dtype)
        if self.buffers == "proxy" and proxy is not None and cohort.nodes:
            buffers = proxy.refreshed(vector, buffers)
        return Outcome(origin.moved(vector, buffers), memory, cohort.weights_of(vector), _finite(cohort.notes))

    def _buffers(self, origin: Model, replies: list[Reply]) -> Tensor:
        """The float buffers `[B]` of a round."""
        if not replies:
            return origin.buffers
        rows = torch.stack([reply.buffers.double() for reply in replies])
        examples = torch.tensor([float(reply.report.examples) for reply in replies], dtype=torch.float64)
        if self.buffers == "median":
            buffers = median(rows)
        elif examples.sum() > 0:
            buffers = examples @ rows / examples.sum()
        else:
            return origin.buffers
        return buffers.to(origin.buffers.dtype)


def _finite(notes: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in notes.items() if isfinite(value)}


def _is_finite(reply: Reply, origin: Model, proxy: Proxy) -> bool:
    """Whether the reply's outputs on the proxy data are finite: a finite model may be too large to be used."""
    scores = proxy.scores(joined(reply.parts, origin.parameters.dtype), reply.buffers)
    return bool(scores.isfinite().all())
