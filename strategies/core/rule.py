"""What every kind of rule is: settings in a frozen dataclass, memory as a value, one round as one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar, final

from corymb.strategies.core.layout import Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply

M = TypeVar("M")  # memory: None, or a frozen dataclass of scalars, strings, tuples and tensors


@dataclass(frozen=True)
class Outcome(Generic[M]):
    """What a round becomes: the new model, the rule's new memory, and what the run's record keeps.

    `weights {node: weight}` mean the same for every rule: `next model = rest + sum_k weight_k * model_k`, where `rest`
    does not depend on this round's replies. They need not sum to one. A rule that combines models otherwise has none.
    `notes` are finite numbers by name, such as FedLAW's gamma.
    """

    model: Model
    memory: M
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule(ABC, Generic[M]):
    """A frozen dataclass whose fields are its settings; what changes over rounds is `memory`, a value.

    What a rule declares, as class attributes and by `tolerates`, is measured by `corymb.testing.check_rule`.
    """

    kind: ClassVar[str]
    privacy_modes: ClassVar[tuple[str, ...]] = ("clear",)
    needs_proxy: ClassVar[bool] = False  # data of the server's own
    unanimous: ClassVar[bool] = True  # where all replies agree, they are the next model
    shift_equivariant: ClassVar[bool] = True  # moving the origin and all replies moves the next model as much
    scale_equivariant: ClassVar[bool] = True  # multiplying them multiplies it

    def initial(self) -> M:
        """The memory before the first round."""
        return None  # type: ignore[return-value]  # right for every rule whose memory is None

    def tolerates(self, clients: int) -> int:
        """How many of `clients` replies may be anything at all without carrying the model away."""
        return 0

    def wants_steps(self, node: str) -> bool:
        """Whether the rule uses the updates of single batches, if `node` sends them."""
        return False

    def model_for(self, node: str, origin: Model, memory: M) -> Model:
        """What `node` is sent to train on: the federation's model, unless a rule keeps several."""
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
        """Turn the replies to `origin` into the next model.

        `replies` may be empty, holds at most one reply per node and is read once. `known` names all sites of the
        federation, absent ones included; `proxy` is the server's own data. Nothing that is passed in is changed.
        Raises `ValueError` where a proxy is needed and missing.
        """
        if self.needs_proxy and proxy is None:
            raise ValueError(f"{type(self).__name__} needs proxy data at the server and there are none; give a proxy.")
        return self._aggregate(origin, replies, memory, frozenset(known), proxy)

    @abstractmethod
    def _aggregate(
        self, origin: Model, replies: Iterable[Reply], memory: M, known: frozenset[str], proxy: Proxy | None
    ) -> Outcome[M]:
        """`aggregate`, written once for each kind of rule."""
