"""An election around any rule: the sites choose the round's model among candidates, the one before it included."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from corymb.server.rounds.rejections import Rejection
from corymb.strategies import Model, Proxy, Reply, Report, Rule
from corymb.strategies.voting.election import count, run_off


class Choice(NamedTuple):
    """The number of the elected candidate, and how many sites could have lied about their losses in vain."""

    candidate: int
    certificate: int


@dataclass(frozen=True)
class CandidateElection:
    """Run-off election over candidate models, after Rezaei et al. 2023.

    The candidates are the model of the strategy's own rule, that of each of `rules`, and the model before the
    round, which is a rollback. Each site that was asked to train evaluates all of them on data of its own and
    prefers those with the least `metric`; a site that does not report it is no voter. Costs one evaluation for
    each candidate and site in a round, sent one candidate after the other.
    """

    rules: tuple[Rule[Any], ...] = ()
    metric: str = "loss"

    def initial(self) -> tuple[Any, ...]:
        """What the rules remember before the first round."""
        return tuple(rule.initial() for rule in self.rules)

    def candidates(
        self,
        origin: Model,
        replies: Sequence[Reply],
        memories: Sequence[Any],
        known: Collection[str],
        proxy: Proxy | None,
    ) -> tuple[list[Model], tuple[Any, ...]]:
        """The model of each rule after `replies` to `origin`, and what it remembers from then on."""
        outcomes = [
            rule.aggregate(origin, list(replies), memory, known, proxy)
            for rule, memory in zip(self.rules, memories, strict=True)
        ]
        return [outcome.model for outcome in outcomes], tuple(outcome.memory for outcome in outcomes)

    def choose(self, reports: Sequence[Iterable[Report | Rejection]]) -> Choice | None:
        """The election, from the `reports` on each candidate; None when no site reported anything."""
        losses: dict[str, dict[int, float]] = {}
        for candidate, theirs in enumerate(reports):
            for report in theirs:
                if isinstance(report, Report) and self.metric in report.metrics:
                    losses.setdefault(report.node, {})[candidate] = report.metrics[self.metric]
        if not losses:
            return None
        return elected([losses[node] for node in sorted(losses)], len(reports))


def elected(losses: Sequence[Mapping[int, float]], candidates: int) -> Choice:
    """The election among `candidates`, from the loss that each voter has of each; one it has none of comes last."""
    scores = torch.full((len(losses), 1, candidates), -torch.inf, dtype=torch.float64)
    for voter, mine in enumerate(losses):
        for candidate, loss in mine.items():
            scores[voter, 0, candidate] = -loss
    election = run_off(count(scores))
    return Choice(int(election.classes), int(election.certificates))
