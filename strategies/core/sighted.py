"""Sighted rules, which see all models of a round together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, Generic, Literal, final

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
    """The result of a sighted rule for a cohort: the next parameters `vector [P]` and the rule's next `memory`.

    `weights [K]` are the factors of the models in `vector`, if the rule has such factors (see `Outcome`), and `notes`
    are numbers by name. Both are recorded in the journal. Notes that are not finite are dropped.
    """

    vector: Tensor
    memory: M = None  # type: ignore[assignment]  # correct for every rule whose memory is None
    weights: Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


class SightedRule(Rule[M]):
    """A rule that sees all models of the round together.

    The library, not the rule, aggregates the float buffers. The class attribute `buffers` selects how: "mean" weighs
    them by examples, and "median" is for rules that withstand hostile models. "proxy" takes the mean and then, if the
    server has proxy data, re-estimates BatchNorm's statistics on them; it is for rules whose next model does not fit
    the clients' statistics.
    """

    kind = "sighted"
    buffers: ClassVar[Literal["mean", "median", "proxy"]] = "mean"
    drops_non_finite: ClassVar[bool] = True  # if the rule needs proxy data: drop models with non-finite outputs on them
    runs_without_replies: ClassVar[bool] = False  # the rule also changes the model in a round without replies

    def min_replies(self) -> int:
        """Return the least number of replies for the rule's guarantee; a round with fewer keeps the model.

        Such a round has the note "too-few-replies" with their number.
        """
        return 1

    @abstractmethod
    def mix(self, cohort: Cohort, memory: M) -> Mix[M]:
        """Return the next parameters and memory. The cohort has at least one reply, unless `runs_without_replies`."""

    @final
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: M, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[M]:
        ordered = sorted(replies, key=lambda reply: reply.report.node)
        del replies
        dropped: dict[str, float] = {}
        if self.needs_proxy and proxy is not None and self.drops_non_finite:
            usable = [reply for reply in ordered if _has_finite_outputs(reply, origin, proxy)]
            if len(usable) < len(ordered):
                dropped = {"dropped": len(ordered) - len(usable)}
            ordered = usable
        if not ordered and not self.runs_without_replies:
            return Outcome(origin, memory, notes=dropped)
        if len(ordered) < self.min_replies() and not self.runs_without_replies:
            return Outcome(origin, memory, notes={**dropped, "too-few-replies": float(len(ordered))})
        buffers = self._buffers(origin, ordered)
        all_nodes = known.union(reply.report.node for reply in ordered)
        cohort = Cohort.of(origin, ordered, tuple(sorted(all_nodes)), proxy)
        mixed = self._checked(self.mix(cohort, memory), cohort)
        notes = {name: value for name, value in mixed.notes.items() if isfinite(value)} | dropped
        if mixed.vector is origin.parameters:  # the rule leaves the model unchanged
            return Outcome(origin, mixed.memory, notes=notes)
        vector = mixed.vector.to(origin.parameters.dtype)
        if self.buffers == "proxy" and proxy is not None and cohort.nodes:
            buffers = proxy.refreshed(vector, buffers)
        weights = {} if mixed.weights is None else dict(zip(cohort.nodes, mixed.weights.tolist(), strict=True))
        return Outcome(origin.moved(vector, buffers), mixed.memory, weights, notes)

    def _checked(self, mixed: object, cohort: Cohort) -> Mix[M]:
        """Return the result of `mix`. Raises `TypeError` for a wrong type and `ValueError` for a wrong shape."""
        if not isinstance(mixed, Mix):
            type_name = type(mixed).__name__
            raise TypeError(f"{self}.mix returned a {type_name}, not a Mix; write `return Mix(vector, memory)`.")
        for name, value, shape in (
            ("vector", mixed.vector, cohort.origin.shape),
            ("weights", mixed.weights, cohort.examples.shape),
        ):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{self}.mix returned {name} of type {type(value).__name__}; return a torch.Tensor.")
            if value is not None and value.shape != shape:
                raise ValueError(f"{self}.mix returned {name} of shape {[*value.shape]}; return shape {[*shape]}.")
        return mixed

    def _buffers(self, origin: Model, replies: list[Reply]) -> Tensor:
        """Return the mean or median of the replies' float buffers, `[B]`."""
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


def require_plain(**rules: SightedRule[Any]) -> None:
    """Raise `ValueError` unless each of `rules`, which another rule applies, needs nothing but the models."""
    for name, rule in rules.items():
        if rule.initial() is not None or rule.needs_proxy or rule.needs_metrics or rule.client_algorithm:
            raise ValueError(
                f"{name} = {rule} keeps a memory, or needs proxy data, metrics or a client algorithm; use another rule."
            )


def _has_finite_outputs(reply: Reply, origin: Model, proxy: Proxy) -> bool:
    """Return whether the model's outputs on the proxy data are finite. A model with huge parameters may overflow."""
    scores = proxy.scores(reply.vector(origin.parameters.dtype), reply.buffers)
    return bool(scores.isfinite().all())
