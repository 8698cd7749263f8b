"""What papers claim, beside what was measured here: a table for the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np

from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import Resolved
from corymb.simulations.experiments.settings import Claim
from corymb.simulations.results.folder import FinishedRun

BEGIN, END = "<!-- corymb results: begin -->", "<!-- corymb results: end -->"


@dataclass(frozen=True)
class Finding:
    """A claim with the values of its rule, and of the rule it is compared with, one per seed."""

    claim: Claim
    values: list[float]
    others: list[float] | None = None

    @property
    def found(self) -> float:
        """What lies within the claim's bounds, or not: the mean, or the mean difference."""
        return float(np.mean(self.values)) - (float(np.mean(self.others)) if self.others else 0.0)

    @property
    def holds(self) -> bool:
        """Whether it does."""
        low, high = self.claim.least, self.claim.most
        return (low is None or self.found >= low) and (high is None or self.found <= high)


def findings(resolved: Resolved, runs: list[FinishedRun]) -> list[Finding]:
    """Every claim of an experiment, measured in `runs`. Raises `ValueError` for a measure that no round recorded."""
    experiment = resolved.experiment
    hostile = {seed: resolved.hostile_names(seed) for seed in experiment.seeds}
    found = []
    for claim in experiment.claims:
        mine, others = (
            [measured(claim.measure, run, experiment, hostile[run.seed]) for run in runs if run.rule == rule]
            for rule in (claim.rule, claim.than)
        )
        if not mine or (claim.than and not others):
            raise ValueError(f"There are no runs of {claim.rule!r} and {claim.than!r} to compare.")
        found.append(Finding(claim, mine, others or None))
    return found


def measured(measure: str, run: FinishedRun, experiment: Experiment, hostile: set[str]) -> float:
    """One number of a run; see `Claim`. Numbers of rounds are means over the last rounds that have them."""
    if measure == "accuracy":
        return 100 * run.final_accuracy
    if measure == "seconds":
        return run.wall_seconds
    if measure == "hostile":
        shares = [
            sum(v.weight or 0.0 for v in record.admitted if v.node in hostile) / total
            for record in run.records
            if (total := sum(v.weight or 0.0 for v in record.admitted))
        ]
        if not shares:
            raise ValueError(f"{run.rule!r} recorded no weights, so there is no share of the hostile clients.")
        return float(np.mean(shares))
    newest = experiment.rounds - experiment.evaluate.last
    numbers = [{**record.server, **record.notes} for record in run.records if record.round > newest]
    values = [row[measure] for row in numbers if measure in row]
    if not values:
        known = sorted(set().union(*numbers)) or ["none"]
        raise ValueError(f"No round of {run.rule!r} recorded {measure!r}; there are {', '.join(known)}.")
    return float(np.mean(values)) * (100 if measure.startswith("certified-") else 1)


def table(found: dict[str, tuple[Experiment, list[Finding]]]) -> str:
    """A Markdown table of findings by the experiment's name."""
    lines = [
        f"Made by `corymb results` on {date.today().isoformat()}; mean ± standard deviation over seeds.",
        "",
        "| claim | measured | bar | held |",
        "|---|---|---|---|",
    ]
    for name, (experiment, some) in found.items():
        lines.append(f"| **`{name}`**: {experiment.setting}, {len(experiment.seeds)} seeds | | | |")
        lines += [_row(finding) for finding in some]
    return "\n".join(lines) + "\n"


def _row(finding: Finding) -> str:
    claim = finding.claim
    text = f"{claim.rule} {_numbers(claim.measure, finding.values)}"
    if claim.than and finding.others:
        text += f", {claim.than} {_numbers(claim.measure, finding.others)}: {finding.found:+.2f}"
    bounds = [f"≥ {claim.least:g}"] if claim.least is not None else []
    bounds += [f"≤ {claim.most:g}"] if claim.most is not None else []
    return f"| {claim.paper} | {text} | {', '.join(bounds)} | {'yes' if finding.holds else '**no**'} |"


def _numbers(measure: str, values: list[float]) -> str:
    points = measure == "accuracy" or measure.startswith("certified-")
    name, digits = ("" if measure == "accuracy" else f"{measure} "), 2 if points else 3
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{name}{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def put_into(document: str, text: str) -> str:
    """`document` with `text` between its markers; at its end, with markers, where it has none."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = document + ("\n" if document else ""), "\n"
    return f"{before}{BEGIN}\n{text}{END}{after}"
