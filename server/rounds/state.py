"""The state that passes from round to round, and the method, which does not change during a run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from corymb.protocol.records import EXAMPLES
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.server.rounds.guard_memory import GuardMemory
from corymb.server.rounds.policy import Policy
from corymb.server.rounds.round_size import RoundSize
from corymb.strategies import Model, Proxy, Rule, ServerOptimizer
from corymb.strategies.core.server_optimizer import OptimizerState

log = logging.getLogger("flwr.corymb")


@dataclass(frozen=True)
class Cost:
    """The cost of a run so far: the training messages sent, and the replies admitted in rounds that used them."""

    messages: int = 0
    admitted: int = 0


@dataclass(frozen=True)
class RunState:
    """The state of a run after `round` rounds. The journal stores it; the next round needs nothing else.

    `memory` is the memory of the rule, `moments` the state of the server optimiser, and `candidate_memories` the
    memories of the rules in a candidate election. `round_size` holds the estimates of the round-size policy, and
    `guard` what the policy for replies remembers.
    `known_nodes` has the names of all nodes that were ever connected, and `cost` is the cost so far.
    """

    model: Model
    memory: Any = None
    moments: OptimizerState | None = None
    candidate_memories: tuple[Any, ...] = ()
    round_size: Any = None
    guard: GuardMemory = field(default_factory=GuardMemory)
    known_nodes: frozenset[str] = frozenset()
    cost: Cost = field(default_factory=Cost)
    round: int = 0

    def with_known_nodes(self, names: Collection[str]) -> RunState:
        """Return the state with `names` added to the known nodes."""
        return self if self.known_nodes.issuperset(names) else replace(self, known_nodes=self.known_nodes.union(names))


@dataclass(frozen=True)
class Method:
    """The components that compute the next model from replies. `FlowerStrategy` describes each.

    A round with fewer than `quorum` admitted replies leaves the state as it was.
    `examples_key` is the metric with a client's number of examples. While a rule aggregates, the global random
    generators of Python, numpy and torch are seeded with `seed` and the round's number. A rule that sees all models has
    at most `spill_bytes` of them in memory, and the rest in files. With `shares_nothing`, the model may be empty.
    With `drift`, the record of a round has each client's drift; see `drift.with_drift`.
    Raises `ValueError` if a rule needs a proxy and there is none.
    """

    rule: Rule[Any]
    server_optimizer: ServerOptimizer | None = None
    candidate_election: CandidateElection | None = None
    round_size: RoundSize[Any] | None = None
    proxy: Proxy | None = None
    examples_key: str = EXAMPLES
    seed: int = 0
    quorum: int = 0
    policy: Policy | None = None
    spill_bytes: float = inf
    shares_nothing: bool = False
    drift: bool = False

    def __post_init__(self) -> None:
        others = self.candidate_election.rules if self.candidate_election else ()
        for rule in (self.rule, *others):
            if rule.needs_proxy and self.proxy is None:
                raise ValueError(f"{rule} needs proxy data; pass a proxy.")

    def about(self) -> dict[str, str]:
        """Return what must not change when a run is resumed."""
        return {
            "rule": repr(self.rule),
            "server optimizer": repr(self.server_optimizer),
            "candidate election": repr(self.candidate_election),
            "seed": str(self.seed),
            **({"policy": repr(self.policy)} if self.policy else {}),
        }

    def check(self, model: Model) -> None:
        """Raise `ValueError` if `model` has no parameters, or not those of the proxy's module."""
        if self.shares_nothing and not model.layers.entries:
            return
        if not model.parameters.numel():
            raise ValueError(
                "The model has no tensor of floating-point numbers, and rules aggregate no others; send float tensors."
            )
        if kept := [name for name in model.integers if name.rpartition(".")[2] != "num_batches_tracked"]:
            log.warning("\t│ Integer tensors are not aggregated; the model keeps its own: %s.", ", ".join(kept))
        if self.proxy is None:
            return
        model_entries, proxy_entries = (
            [(e.name, list(e.shape), e.dtype) for e in layout.parameters]
            for layout in (model.layers, self.proxy.layout)
        )
        if model_entries != proxy_entries:
            name, shape, dtype = next(
                (e for e in [*proxy_entries, *model_entries] if e not in model_entries or e not in proxy_entries),
                model_entries[0],
            )
            raise ValueError(f"The proxy's module is not the model: only one of them has {name!r} as {dtype} {shape}.")

    def initial(self, model: Model) -> RunState:
        """Return the state before the first round, which starts from `model`."""
        election, size = self.candidate_election, self.round_size
        return RunState(
            model,
            self.rule.initial(),
            self.server_optimizer.initial() if self.server_optimizer else None,
            election.initial() if election else (),
            size.initial() if size else None,
        )
