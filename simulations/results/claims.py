"""Compare the claims of papers with the measurements of runs, in a Markdown table for the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np

from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import Resolved
from corymb.simulations.experiments.settings import Claim
from corymb.simulations.results.folder import FinishedRun
from corymb.simulations.results.score import VIRTUAL

BEGIN, END = "<!-- corymb results: begin -->", "<!-- corymb results: end -->"


@dataclass(frozen=True)
class Finding:
    """A claim with its measured `values`, one per seed, and those of the rule it is compared with, if any."""

    claim: Claim
    values: list[float]
    others: list[float] | None = None

    @property
    def result(self) -> float:
        """The mean over seeds, or the difference or ratio of the two means, which the claim bounds."""
        if self.claim.ratio and self.others:
            return float(np.mean(self.others)) / float(np.mean(self.values))
        return float(np.mean(self.values)) - (float(np.mean(self.others)) if self.others else 0.0)

    @property
    def holds(self) -> bool:
        """Whether the result is within the bounds of the claim."""
        low, high = self.claim.least, self.claim.most
        return (low is None or self.result >= low) and (high is None or self.result <= high)


def findings(resolved: Resolved, runs: list[FinishedRun]) -> list[Finding]:
    """Measure every claim of an experiment in `runs`. Raises `ValueError` for a measure that no round recorded."""
    experiment = resolved.experiment
    hostile = {seed: resolved.hostile_names(seed) for seed in experiment.seeds}
    measurements = []
    for claim in experiment.claims:
        values, others = (
            [measured(claim.measure, run, experiment, hostile[run.seed]) for run in runs if run.rule == rule]
            for rule in (claim.rule, claim.than)
        )
        if not values or (claim.than and not others):
            names = " and ".join(repr(name) for name in (claim.rule, claim.than) if name)
            raise ValueError(f"The claim {claim.claim!r} is about {names}, but not all of them have runs.")
        measurements.append(Finding(claim, values, others or None))
    return measurements


def measured(measure: str, run: FinishedRun, experiment: Experiment, hostile: set[str]) -> float:
    """Return the value of a `measure` in one run; see `Claim`.

    A number in the records of rounds is averaged over the last `evaluate.last` rounds, where it is recorded. Raises
    `ValueError` for a measure that no round recorded.
    """
    if measure == "accuracy":
        return run.score.shown(run.final)
    if measure == "megabytes" or "-to-" in measure:
        return _until(measure, run)
    if measure == "seconds":
        return run.wall_seconds
    if measure == "hostile":
        shares = [
            sum(v.weight or 0.0 for v in record.admitted if v.node in hostile) / total
            for record in run.records
            if (total := sum(v.weight or 0.0 for v in record.admitted))
        ]
        if not shares:
            raise ValueError(f"The rule {run.rule!r} recorded no weights, so it has no measure 'hostile'.")
        return float(np.mean(shares))
    skipped = experiment.rounds - experiment.evaluate.last
    numbers = [{**record.server, **record.notes} for record in run.records if record.round > skipped]
    values = [row[measure] for row in numbers if measure in row]
    if not values:
        recorded = sorted(set().union(*numbers)) or ["none"]
        raise ValueError(f"No round of {run.rule!r} recorded {measure!r}; it recorded {', '.join(recorded)}.")
    return float(np.mean(values)) * (100 if measure.startswith("certified-") else 1)


def _until(measure: str, run: FinishedRun) -> float:
    """Return what a run takes until its score reaches a target, or as a whole.

    A run that does not reach the target takes one round more than it has; its time and bytes are those of the whole.
    """
    unit, _, target = measure.partition("-to-")
    records, key = run.records, run.score.key
    goal = run.score.rank(float(target)) if target else float("inf")
    reached = next(
        (n for n, r in enumerate(records) if key in r.server and run.score.rank(r.server[key]) >= goal), len(records)
    )
    if unit == "rounds":
        return float(reached + 1)
    used = records[: reached + 1]
    if unit == VIRTUAL:
        return float(used[-1].notes[VIRTUAL])
    return sum(record.bytes_up + record.bytes_down for record in used) / 1e6


def table(results: dict[str, tuple[Experiment, list[Finding]]]) -> str:
    """Return a Markdown table of `results`, which are findings by the name of their experiment."""
    lines = [
        f"Made by `corymb results` on {date.today().isoformat()}; mean ± standard deviation over seeds. Accuracies are "
        "in percent; a claim holds if the difference, or the single value, is within the bar.",
        "",
        "| claim | measured | bar | held |",
        "|---|---|---|---|",
    ]
    for name, (experiment, rows) in results.items():
        lines.append(f"| **`{name}`**: {experiment.setting}, {len(experiment.seeds)} seeds | | | |")
        lines += [_row(finding) for finding in rows]
    return "\n".join(lines) + "\n"


def _row(finding: Finding) -> str:
    claim = finding.claim
    text = f"{claim.rule} {_numbers(claim.measure, finding.values)}"
    if claim.than and finding.others:
        result = f"{finding.result:.2f}x" if claim.ratio else f"{finding.result:+.2f}"
        text += f", {claim.than} {_numbers(claim.measure, finding.others)}: {result}"
    bounds = [f"≥ {claim.least:g}"] if claim.least is not None else []
    bounds += [f"≤ {claim.most:g}"] if claim.most is not None else []
    return f"| {claim.claim} | {text} | {', '.join(bounds)} | {'yes' if finding.holds else '**no**'} |"


def _numbers(measure: str, values: list[float]) -> str:
    is_percent = measure == "accuracy" or measure.startswith("certified-")
    name, digits = ("" if measure == "accuracy" else f"{measure} "), 2 if is_percent else 3
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{name}{np.mean(values):.{digits}f}{deviation}"


def put_into(document: str, text: str) -> str:
    """Return `document` with `text` between its markers; without markers, append them and the text."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = document + ("\n" if document else ""), "\n"
    return f"{before}{BEGIN}\n{text}{END}{after}"
