"""Every client's result under each rule: the score on its own test part, and what the clients have of it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, isnan, nan

import numpy as np

from corymb.server.rule_settings import LOCAL
from corymb.simulations.results.folder import FinishedRun
from corymb.simulations.results.score import NEW_CLIENT, Score

WORST_SHARE = 0.1
MAX_COLUMNS = 12  # clients with a column each in the report


@dataclass(frozen=True)
class ClientResults:
    """The clients' scores under `rule` at the last test, each a mean over seeds.

    `gap` is the mean test loss minus the mean training loss. `gaining` is the share of clients whose score is better
    than under the rule "local"; NaN without that rule. `metrics` are the means of all metrics over the clients, and
    `new` the mean score of clients that took no part in the training, NaN without them. At the clients `undefined`, the
    score is not defined, such as an AUROC where all examples have the same class.
    """

    rule: str
    score: Score
    by_client: Mapping[str, float]
    gap: float
    gaining: float = nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    new: float = nan
    undefined: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        """The clients' scores."""
        return list(self.by_client.values())

    @property
    def mean(self) -> float:
        """The mean over clients."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """The standard deviation over clients."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def worst_tenth(self) -> float:
        """The mean over the worst tenth of the clients, at least one."""
        ordered = sorted(self.values, key=self.score.rank)
        return float(np.mean(ordered[: ceil(WORST_SHARE * len(ordered))]))


def client_results(runs: Sequence[FinishedRun]) -> list[ClientResults]:
    """Return the results of each rule of `runs`, best mean first; an empty list if no client was tested."""
    found = [_of_rule([run for run in runs if run.rule == rule]) for rule in dict.fromkeys(run.rule for run in runs)]
    tested = [results for results in found if results is not None]
    alone = next((results.by_client for results in tested if results.rule == LOCAL), None)
    if alone is not None:
        tested = [_with_gain(results, alone) for results in tested]
    return sorted(tested, key=lambda results: -results.score.rank(results.mean))


def _of_rule(runs: Sequence[FinishedRun]) -> ClientResults | None:
    score = runs[0].score
    by_client: dict[str, list[float]] = {}
    metrics: dict[str, list[float]] = {}
    gaps, new, names = [], [], set()
    for run in runs:
        last = next((record for record in reversed(run.records) if record.evaluations), None)
        if last is None:
            return None
        for verdict in last.evaluations:
            if NEW_CLIENT in verdict.metrics:
                continue  # new clients have a column of their own
            names.add(verdict.node)
            if score.name in verdict.metrics:
                by_client.setdefault(verdict.node, []).append(verdict.metrics[score.name])
            for name, value in verdict.metrics.items():
                metrics.setdefault(name, []).append(value)
        gaps.append(last.server.get("clients-loss", nan) - last.train.get("loss", nan))
        new.append(last.server.get(f"new-clients-{score.name}", nan))
    if not by_client:
        return None
    means = {name: float(np.mean(values)) for name, values in metrics.items() if name != "seconds"}
    each = {node: float(np.mean(values)) for node, values in sorted(by_client.items())}
    without = tuple(sorted(names - each.keys()))
    return ClientResults(runs[0].rule, score, each, float(np.mean(gaps)), nan, means, float(np.mean(new)), without)


def _with_gain(results: ClientResults, alone: Mapping[str, float]) -> ClientResults:
    rank = results.score.rank
    both = [node for node in results.by_client if node in alone]
    better = [rank(results.by_client[node]) > rank(alone[node]) for node in both]
    share = float(np.mean(better)) if better and results.rule != LOCAL else nan
    return replace(results, gaining=share)


def columns_of(results: Sequence[ClientResults]) -> dict[str, Callable[[ClientResults], str]]:
    """Return the columns of a table of `results`, and how each shows a rule."""
    columns: dict[str, Callable[[ClientResults], str]] = {
        "rule": lambda each: each.rule,
        "mean": lambda each: each.score.text(each.mean),
        "over clients": lambda each: each.score.text(each.deviation),
        "worst tenth": lambda each: each.score.text(each.worst_tenth),
    }
    if any(not isnan(each.gaining) for each in results):
        columns["better than local"] = lambda each: "" if isnan(each.gaining) else f"{100 * each.gaining:.0f} %"
    if any(not isnan(each.new) for each in results):
        columns["new clients"] = lambda each: "" if isnan(each.new) else each.score.text(each.new)
    columns["loss gap"] = lambda each: "" if isnan(each.gap) else f"{each.gap:+.3f}"
    if "ece" in results[0].metrics and results[0].score.name != "ece":
        columns["ece"] = lambda each: f"{each.metrics['ece']:.3f}"
    return columns


def without_score(results: Sequence[ClientResults]) -> str:
    """Return a sentence about the clients at which the score is not defined; "" if there are none."""
    missing = sorted({node for each in results for node in each.undefined})
    if not missing:
        return ""
    shown = ", ".join(missing[:MAX_COLUMNS]) + (", ..." if len(missing) > MAX_COLUMNS else "")
    return f"The {results[0].score.name} is not defined at {len(missing)} clients, whose tests do not count: {shown}."


def client_columns(results: Sequence[ClientResults]) -> list[str]:
    """Return the names of the clients, if they are few enough for a column each."""
    names = sorted({node for each in results for node in each.by_client})
    return names if len(names) <= MAX_COLUMNS else []
