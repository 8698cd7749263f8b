"""An election that works with any rule: the clients choose the round's model among several candidates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from corymb.server.rounds.rejections import Rejection
from corymb.strategies import Model, Proxy, Reply, Report, Rule
from corymb.strategies.voting.election import count, run_off


class ElectionResult(NamedTuple):
    """The result of an election.

    `candidate` is the index of the elected candidate. The result would be the same if up to `certificate` clients had
    reported any other losses.
    """

    candidate: int
    certificate: int


@dataclass(frozen=True)
class CandidateElection:
    """Run-off election over candidate models, after Rezaei et al. 2023.

    The candidates are the model of the strategy's rule, the model of each of `rules`, and the model before the round;
    electing the last is a rollback. Each client that was sampled for training evaluates all candidates on its own
    data and prefers lower values of `metric`. A client that does not report `metric` has no vote. Each round costs
    one evaluation per candidate and client; the candidates are sent one after the other.
    """

    rules: tuple[Rule[Any], ...] = ()
    metric: str = "loss"

    def initial(self) -> tuple[Any, ...]:
        """Return the memory of each of `rules` before the first round."""
        return tuple(rule.initial() for rule in self.rules)

    def candidates(
        self,
        origin: Model,
        replies: Sequence[Reply],
        memories: Sequence[Any],
        known: Collection[str],
        proxy: Proxy | None,
    ) -> tuple[list[Model], tuple[Any, ...]]:
        """Return the model of each of `rules` after `replies` to `origin`, and the new memory of each rule."""
        outcomes = [
            rule.aggregate(origin, list(replies), memory, known, proxy)
            for rule, memory in zip(self.rules, memories, strict=True)
        ]
        return [outcome.model for outcome in outcomes], tuple(outcome.memory for outcome in outcomes)

    def choose(self, reports: Sequence[Iterable[Report | Rejection]]) -> ElectionResult | None:
        """Hold the election. `reports[c]` are the reports on candidate c. Returns None if none has the metric."""
        losses: dict[str, dict[int, float]] = {}
        for candidate, candidate_reports in enumerate(reports):
            for report in candidate_reports:
                if isinstance(report, Report) and self.metric in report.metrics:
                    losses.setdefault(report.node, {})[candidate] = report.metrics[self.metric]
        if not losses:
            return None
        return elected([losses[node] for node in sorted(losses)], len(reports))


def elected(losses: Sequence[Mapping[int, float]], candidates: int) -> ElectionResult:
    """Elect one of `candidates` models.

    `losses[v][c]` is the loss that voter v reports for candidate c. A candidate without a loss is ranked last.
    """
    scores = torch.full((len(losses), 1, candidates), -torch.inf, dtype=torch.float64)
    for voter, voter_losses in enumerate(losses):
        for candidate, loss in voter_losses.items():
            scores[voter, 0, candidate] = -loss
    election = run_off(count(scores))
    return ElectionResult(int(election.classes), int(election.certificates))
