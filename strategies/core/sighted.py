"""Rules that see every model of the round at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import ClassVar, Generic, Literal, final

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.layout import Model
from corymb.strategies.core.order_statistics import median
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply
from corymb.strategies.core.rule import M, Outcome, Rule


@dataclass(frozen=True)
class Mix(Generic[M]):
    """What a sighted rule makes of a cohort: the next parameters `vector [P]` and the rule's next `memory`.

    For the record: `weights [K]`, the factor of each model in the vector, if the rule has such (see `Outcome`), and
    `notes`, numbers by name; those that are not finite are left out.
    """

    vector: Tensor
    memory: M = None  # type: ignore[assignment]  # right for every rule whose memory is None
    weights: Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


class SightedRule(Rule[M]):
    """Sees every model of the round at once.

    Float buffers never reach it: their "mean" is taken by size; a rule that withstands hostile models takes their
    "median"; "proxy" estimates BatchNorm's statistics anew on the server's own data, where there are such data, for
    rules whose models the sites' statistics do not fit.
    """

    kind = "sighted"
    buffers: ClassVar[Literal["mean", "median", "proxy"]] = "mean"
    screens: ClassVar[bool] = True  # with proxy data: leaves out models whose outputs on them are not finite
    acts_alone: ClassVar[bool] = False  # moves the model in a round without replies, too

    @abstractmethod
    def mix(self, cohort: Cohort, memory: M) -> Mix[M]:
        """The next parameters and memory. The cohort has at least one reply, unless `acts_alone`."""

    @final
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: M, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[M]:
        ordered = sorted(replies, key=lambda reply: reply.report.node)
        del replies
        dropped: dict[str, float] = {}
        if self.needs_proxy and proxy is not None and self.screens:
            sound = [reply for reply in ordered if _is_finite(reply, origin, proxy)]
            if len(sound) < len(ordered):
                dropped = {"dropped": len(ordered) - len(sound)}
            ordered = sound
        if not ordered and not self.acts_alone:
            return Outcome(origin, memory, notes=dropped)
        buffers = self._buffers(origin, ordered)
        everyone = known.union(reply.report.node for reply in ordered)
        cohort = Cohort.of(origin, ordered, tuple(sorted(everyone)), proxy)
        mixed = self._checked(self.mix(cohort, memory), cohort)
        notes = {name: value for name, value in mixed.notes.items() if isfinite(value)} | dropped
        if mixed.vector is origin.parameters:  # the rule chose to change nothing
            return Outcome(origin, mixed.memory, notes=notes)
        vector = mixed.vector.to(origin.parameters.dtype)
        if self.buffers == "proxy" and proxy is not None and cohort.nodes:
            buffers = proxy.refreshed(vector, buffers)
        weights = {} if mixed.weights is None else dict(zip(cohort.nodes, mixed.weights.tolist(), strict=True))
        return Outcome(origin.moved(vector, buffers), mixed.memory, weights, notes)

    def _checked(self, mixed: object, cohort: Cohort) -> Mix[M]:
        """What `mix` returned. Raises `TypeError` or `ValueError` for what is no mix of this cohort."""
        if not isinstance(mixed, Mix):
            kind = type(mixed).__name__
            raise TypeError(f"{self}.mix returned a {kind}, not a Mix; write `return Mix(vector, memory)`.")
        for name, value, shape in (
            ("vector", mixed.vector, cohort.origin.shape),
            ("weights", mixed.weights, cohort.examples.shape),
        ):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{self}.mix returned {name} of type {type(value).__name__}; return a torch.Tensor.")
            if value is not None and value.shape != shape:
                raise ValueError(f"{self}.mix returned {name} of shape {[*value.shape]}; it must be {[*shape]}.")
        return mixed

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


def _is_finite(reply: Reply, origin: Model, proxy: Proxy) -> bool:
    """Whether the reply's outputs on the proxy data are finite: a finite model may be too large to be used."""
    scores = proxy.scores(reply.vector(origin.parameters.dtype), reply.buffers)
    return bool(scores.isfinite().all())
