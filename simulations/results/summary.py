"""The summary of an experiment: one row per rule, as a table in Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.results.client_results import client_results
from corymb.simulations.results.folder import FinishedRun
from corymb.simulations.results.score import VIRTUAL, Score
from corymb.simulations.results.stored import CONFIG, SUMMARY

TEXTS = ("experiment", "rule")  # columns without numbers
FORMATS = ("markdown", "latex", "csv")
Row = dict[str, Any]


def experiments_under(folder: Path) -> list[Path]:
    """Return the folders of all finished experiments in `folder` and below, by name."""
    return sorted(path.parent for path in folder.glob(f"**/{CONFIG}") if (path.parent / SUMMARY).exists())


def names_of(experiments: Sequence[Experiment], folders: Sequence[Path]) -> list[str]:
    """Return the experiments' names, with the folder where several have the same, as those of a sweep do."""
    names = [experiment.name for experiment in experiments]
    return [f"{n} ({f.name})" if names.count(n) > 1 else n for n, f in zip(names, folders, strict=True)]


def summary_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """Return a row for each rule of `runs`, best first.

    The score is the mean over seeds, and `over seeds` its standard deviation, NaN for one seed. The task's further
    metrics follow. With tests at the clients, the score is the clients' mean, the server's test of the shared model
    stands beside it, and further columns say how the score is spread over the clients. `MB up` and `MB down` are the
    megabytes of a run, from and to all clients; `seconds` are those of this machine.
    """
    score, found = runs[0].score, scores(list(runs))
    tested = {results.rule: results for results in client_results(runs)}
    has_local = any(not isnan(results.gaining) for results in tested.values())
    others = dict.fromkeys(other for run in runs for other in run.others)
    rows = []
    for rule in sorted(found, key=lambda rule: -score.rank(found[rule][0])):
        own = [run for run in runs if run.rule == rule]
        row: Row = {"rule": rule, score.key: found[rule][0], "over seeds": found[rule][1], "seeds": len(own)}
        row |= {other.key: nan for other in others} | {each.key: value for each, value in mean_others(own).items()}
        if rule in tested:
            row |= {"worst tenth": tested[rule].worst_tenth, "over clients": tested[rule].deviation}
            if has_local:
                row["better than local"] = tested[rule].gaining
        for way in ("up", "down"):
            row[f"MB {way}"] = _mean([sum(getattr(r, f"bytes_{way}") for r in run.records) for run in own]) / 1e6
        row["seconds"] = _mean([run.wall_seconds for run in own])
        virtual = [run.records[-1].notes.get(VIRTUAL) for run in own]
        if all(value is not None for value in virtual):
            row["virtual seconds"] = _mean([float(value) for value in virtual if value is not None])
        rows.append(row)
    return rows


def mean_others(runs: Sequence[FinishedRun]) -> dict[Score, float]:
    """Return the means over runs of one rule of the task's further metrics."""
    names = dict.fromkeys(other for run in runs for other in run.others)
    return {other: _mean([run.others[other] for run in runs if other in run.others]) for other in names}


def further_metrics(runs: Sequence[FinishedRun]) -> dict[Score, dict[str, str]]:
    """Return the task's further metrics, and each rule's mean as text; "" for a rule under which it is not defined."""
    means = {rule: mean_others([run for run in runs if run.rule == rule]) for rule in {run.rule for run in runs}}
    names = dict.fromkeys(other for run in runs for other in run.others)
    return {
        other: {rule: other.text(own[other]) if other in own else "" for rule, own in means.items()} for other in names
    }


def scores(runs: list[FinishedRun]) -> dict[str, tuple[float, float]]:
    """Return each rule's mean final score over seeds, and its standard deviation; NaN for one seed."""
    by_rule = {rule: [run.final for run in runs if run.rule == rule] for rule in dict.fromkeys(r.rule for r in runs)}
    return {
        rule: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else nan)
        for rule, values in by_rule.items()
    }


def table(rows: Sequence[Row], kind: str = "markdown") -> str:
    """Return `rows` as a table of the `kind` "markdown", "latex" or "csv". Raises `ValueError` for another kind."""
    if kind not in FORMATS:
        raise ValueError(f"The format {kind!r} is unknown; use one of {', '.join(FORMATS)}.")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [["" if _is_nan(row.get(column)) else row.get(column, "") for column in columns] for row in rows]
    if kind == "csv":
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *cells])
        return text.getvalue()
    shown = [[_text(cell) for cell in line] for line in cells]
    if kind == "markdown":
        lines = [columns, ["---" if column in TEXTS else "---:" for column in columns], *shown]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    body = "".join(f"  {' & '.join(map(_latex, line))} \\\\\n" for line in shown)
    head = f"  {' & '.join(map(_latex, columns))} \\\\\n"
    layout = "".join("l" if column in TEXTS else "r" for column in columns)
    return f"\\begin{{tabular}}{{{layout}}}\n  \\hline\n{head}  \\hline\n{body}  \\hline\n\\end{{tabular}}\n"


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and isnan(cell)


def _text(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.4f}" if abs(cell) < 10 else f"{cell:.1f}"


def _latex(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, f"\\{character}")
    return text


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
