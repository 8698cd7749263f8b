"""What goes from round to round, and what does not change over a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from corymb.protocol.records import EXAMPLES
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.server.rounds.round_size import RoundSize
from corymb.strategies import Model, Proxy, Rule, ServerOptimizer
from corymb.strategies.core.server_optimizer import Moments


@dataclass(frozen=True)
class Spent:
    """What a run has cost so far: training messages sent, and replies that counted."""

    messages: int = 0
    admitted: int = 0


@dataclass(frozen=True)
class RunState:
    """All that a run has reached after `round` rounds: what the journal stores, and all that going on needs.

    `memory` is the rule's, `moments` the server optimiser's, `candidate_memories` those of the rules in a candidate
    election, `round_size` what the policy of waiting has learnt. `known` names every node ever connected.
    """

    model: Model
    memory: Any = None
    moments: Moments | None = None
    candidate_memories: tuple[Any, ...] = ()
    round_size: Any = None
    known: frozenset[str] = frozenset()
    spent: Spent = field(default_factory=Spent)
    round: int = 0

    def knowing(self, names: Collection[str]) -> RunState:
        """With `names` among the known nodes."""
        return self if self.known.issuperset(names) else replace(self, known=self.known.union(names))


@dataclass(frozen=True)
class Method:
    """How replies become the next model: the rule and what stands around it. See `FlowerStrategy` for each part."""

    rule: Rule[Any]
    server_optimizer: ServerOptimizer | None = None
    candidate_election: CandidateElection | None = None
    round_size: RoundSize[Any] | None = None
    proxy: Proxy | None = None
    examples_key: str = EXAMPLES

    def __post_init__(self) -> None:
        others = self.candidate_election.rules if self.candidate_election else ()
        for rule in (self.rule, *others):
            if rule.needs_proxy and self.proxy is None:
                raise ValueError(f"{rule} needs data of the server's own; give a proxy.")

    def check(self, model: Model) -> None:
        """Raise `ValueError` where the proxy's module is another model."""
        if self.proxy is None:
            return
        ours, theirs = (
            [(e.name, list(e.shape), e.dtype) for e in layout.parameters]
            for layout in (model.layers, self.proxy.layout)
        )
        if ours != theirs:
            name, shape, dtype = next((e for e in [*theirs, *ours] if e not in ours or e not in theirs), ours[0])
            raise ValueError(f"The proxy's module is not the model: {name!r}, {dtype} {shape}, is in one only.")

    def initial(self, model: Model) -> RunState:
        """The state before the first round, which begins with `model`."""
        election, size = self.candidate_election, self.round_size
        return RunState(
            model,
            self.rule.initial(),
            self.server_optimizer.initial() if self.server_optimizer else None,
            election.initial() if election else (),
            size.initial() if size else None,
        )
