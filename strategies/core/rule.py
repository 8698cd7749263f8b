"""The base class of all rules: settings in a frozen dataclass, memory passed as a value, one call per round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, final

from torch import Tensor

from corymb.strategies.core.layout import Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply

M = TypeVar("M")  # memory: None, or a frozen dataclass of scalars, strings, tuples and tensors


@dataclass(frozen=True)
class Outcome(Generic[M]):
    """The result of a round: the next model, the rule's next memory, and values for the journal.

    `weights {node: weight}` have the same meaning for every rule: `next model = rest + sum_k weight_k * model_k`,
    where `rest` does not depend on this round's replies. They need not sum to one. They are empty for a rule whose
    next model is not of this form. `notes` are finite numbers by name, such as FedLAW's gamma.
    """

    model: Model
    memory: M
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule(ABC, Generic[M]):
    """An aggregation rule: a frozen dataclass whose fields are the rule's settings.

    The state that changes between rounds is `memory`, a value that the caller passes in and gets back. The class
    attributes and `tolerates` declare properties of the rule; `corymb.testing.check_rule` tests them.
    """

    kind: ClassVar[str]
    privacy_modes: ClassVar[tuple[str, ...]] = ("clear",)
    needs_proxy: ClassVar[bool] = False  # the rule needs proxy data at the server
    client_algorithm: ClassVar[str] = ""  # the algorithm that the clients must run; see `corymb.client`
    needs_metrics: ClassVar[tuple[str, ...]] = ()  # positive numbers without which the door rejects a reply
    preserves_consensus: ClassVar[bool] = True  # if all replies are the same model, it is the next model
    shift_equivariant: ClassVar[bool] = True  # a shift of the origin and all replies shifts the next model equally
    scale_equivariant: ClassVar[bool] = True  # scaling the origin and all replies scales the next model equally

    def initial(self) -> M:
        """Return the memory before the first round."""
        return None  # type: ignore[return-value]  # correct for every rule whose memory is None

    def tolerates(self, clients: int) -> int:
        """Return how many of `clients` replies may be arbitrary without moving the model arbitrarily far."""
        return 0

    def wants_batch_updates(self, node: str) -> bool:
        """Return whether the rule uses the updates of single batches from `node`."""
        return False

    def client_options(self) -> dict[str, Any]:
        """Return the settings that the clients' algorithm shares with the rule."""
        return {}

    def second_vector(self, origin: Tensor, memory: M) -> Tensor | None:
        """Return a vector `[P]` that goes to every client beside the model; by default none."""
        return None

    def model_for(self, node: str, origin: Model, memory: M) -> Model:
        """Return the model that `node` trains from: the global model, unless the rule keeps several models."""
        return origin

    @final
    def aggregate(
        self,
        origin: Model,
        replies: Iterable[Reply],
        memory: M,
        known: Collection[str] = (),
        proxy: Proxy | None = None,
    ) -> Outcome[M]:
        """Aggregate the replies to `origin` into the next model.

        `replies` may be empty, holds at most one reply per node and is read once. `known` names all clients of the
        federation, absent ones included. `proxy` is the server's proxy data. The arguments are not modified.
        Raises `ValueError` if the rule needs proxy data and `proxy` is None, and for a model without parameters.
        """
        if self.needs_proxy and proxy is None:
            raise ValueError(f"{type(self).__name__} needs proxy data, but the server has none; set `proxy`.")
        if not origin.parameters.numel():
            raise ValueError("The model has no parameters, so there is nothing to aggregate.")
        if self.needs_metrics:
            replies = self._with_metrics(replies)
        return self._aggregate(origin, replies, memory, frozenset(known), proxy)

    def _with_metrics(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """Yield `replies`. Raises `ValueError` for one that lacks a metric; in a run, the door has rejected it."""
        for reply in replies:
            if lacking := reply.report.lacks(self.needs_metrics):
                raise ValueError(f"{self} needs the metric {lacking!r}, and {reply.report.node} reports none.")
            yield reply
            del reply

    @abstractmethod
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: M, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[M]:
        """Do the work of `aggregate`. Each kind of rule (blind, sighted, voting) has its own implementation."""
