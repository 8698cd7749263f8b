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
    """The clients' scores under `rule` at the last test.

    `by_seed` are those of each run. What is said of the clients together is computed in each run, and then averaged,
    because clients of the same name may be others under another seed; `by_client` are means over seeds. `gap` is the
    mean test loss minus the mean training loss; NaN if clients test another model than the one whose training loss
    they report, as under Ditto. `gaining` is the share of clients whose score is better than under the rule "local";
    NaN without that rule. `metrics` are the means of all metrics over the clients, and `new` the mean score of clients
    that took no part in the training; NaN without them, and under "local", which trains no model for them. At the
    clients `undefined`, the score is not defined, such as an AUROC where all examples have the same class.
    """

    rule: str
    score: Score
    by_seed: Mapping[int, Mapping[str, float]]
    gap: float
    gaining: float = nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    new: float = nan
    undefined: tuple[str, ...] = ()

    @property
    def by_client(self) -> dict[str, float]:
        """The score of each client, a mean over seeds."""
        names = sorted({name for scores in self.by_seed.values() for name in scores})
        return {name: _mean([scores[name] for scores in self.by_seed.values() if name in scores]) for name in names}

    @property
    def values(self) -> list[float]:
        """The scores of all clients in all runs."""
        return [value for scores in self.by_seed.values() for value in scores.values()]

    @property
    def mean(self) -> float:
        """The mean over clients."""
        return self._over_seeds(_mean)

    @property
    def deviation(self) -> float:
        """The standard deviation over clients."""
        return self._over_seeds(lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)

    @property
    def worst_tenth(self) -> float:
        """The mean over the worst tenth of the clients, at least one."""
        return self._over_seeds(
            lambda values: _mean(sorted(values, key=self.score.rank)[: ceil(WORST_SHARE * len(values))])
        )

    def _over_seeds(self, of: Callable[[list[float]], float]) -> float:
        return _mean([of(list(scores.values())) for scores in self.by_seed.values()])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def client_results(runs: Sequence[FinishedRun]) -> list[ClientResults]:
    """Return the results of each rule of `runs`, best mean first; an empty list if no client was tested."""
    found = [_of_rule([run for run in runs if run.rule == rule]) for rule in dict.fromkeys(run.rule for run in runs)]
    tested = [results for results in found if results is not None]
    alone = next((results.by_seed for results in tested if results.rule == LOCAL), None)
    if alone is not None:
        tested = [_with_gain(results, alone) for results in tested]
    return sorted(tested, key=lambda results: -results.score.rank(results.mean))


def _of_rule(runs: Sequence[FinishedRun]) -> ClientResults | None:
    score = runs[0].score
    by_seed: dict[int, dict[str, float]] = {}
    metrics: dict[str, list[float]] = {}
    gaps, new, names = [], [], set()
    for run in runs:
        last = next((record for record in reversed(run.records) if record.evaluations), None)
        if last is None:
            return None
        scores = {v.node: v.metrics[score.name] for v in last.evaluations if score.name in v.metrics}
        for verdict in last.evaluations:
            if NEW_CLIENT in verdict.metrics:
                scores.pop(verdict.node, None)  # new clients have a column of their own
                continue
            names.add(verdict.node)
            for name, value in verdict.metrics.items():
                metrics.setdefault(name, []).append(value)
        if scores:
            by_seed[run.seed] = dict(sorted(scores.items()))
        gap = last.server.get("clients-loss", nan) - last.train.get("loss", nan)
        gaps.append(nan if run.tests_another_model else gap)
        new.append(nan if run.rule == LOCAL else last.server.get(f"new-clients-{score.name}", nan))
    if not by_seed:
        return None
    means = {name: _mean(values) for name, values in metrics.items() if name != "seconds"}
    without = tuple(sorted(names - {name for scores in by_seed.values() for name in scores}))
    return ClientResults(runs[0].rule, score, by_seed, _mean(gaps), nan, means, _mean(new), without)


def _with_gain(results: ClientResults, alone: Mapping[int, Mapping[str, float]]) -> ClientResults:
    if results.rule == LOCAL:
        return results
    rank, shares = results.score.rank, []
    for seed, scores in results.by_seed.items():
        both = [node for node in scores if node in alone.get(seed, {})]
        if both:
            shares.append(_mean([rank(scores[node]) > rank(alone[seed][node]) for node in both]))
    return replace(results, gaining=_mean(shares) if shares else nan)


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
