"""A sweep: an experiment for every combination of some values; the best of each rule is chosen on a validation part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import parse_change, read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.folder import FinishedRun, collect, is_finished, prepare, write
from corymb.simulations.results.model_tests import VALIDATION
from corymb.simulations.results.report import write_report
from corymb.simulations.results.runner import run_all
from corymb.simulations.results.score import Score
from corymb.simulations.results.summary import table

VALIDATION_SHARE = 0.1
RULES = "rules."  # before the name of a parameter of the rules that have it
Setting = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """A rule under one setting: its scores on the validation part and on the test set, each a mean over seeds."""

    rule: str
    setting: Setting
    validation: float
    test: float


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse `key=value,value,...` into the values of each key. Raises `ValueError` for a key without values."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise ValueError(f"{text!r} is no list of values; write it like train.learning_rate=0.01,0.03,0.1.")
        grid[key] = [parse_change(f"{key}={value}")[1] for value in _split(values)]
    if not grid:
        raise ValueError("A sweep needs values, such as train.learning_rate=0.01,0.03,0.1.")
    return grid


def sweep(
    path: Path, grid: Mapping[str, list[Any]], out: Path, jobs: int, console: Console, force: bool = False
) -> list[Tried]:
    """Run the experiment in `path` for every combination of the values in `grid`, and print the best of each rule.

    A key `rules.NAME` sets the parameter NAME of the rules that have it. Each combination has its own folder in `out`;
    what is finished there is not run again, unless `force` is given, and unfinished runs go on. `out` also gets
    `sweep.csv`. Without a validation part in the experiment, a tenth of the training examples becomes one.
    """
    tried: list[Tried] = []
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    for number, setting in enumerate(settings, 1):
        experiment = _with(path, setting)
        folder = out / _slug(setting)
        console.print(f"{number}/{len(settings)}  {_text(setting)}", markup=False, soft_wrap=True)
        runs = None if force or not is_finished(experiment, folder) else collect(experiment, folder)
        if runs is None:
            resolved = resolve(experiment)
            prepare(experiment, folder, resume=not force)
            (runs,) = run_all([(resolved, folder)], console, jobs)
            write(experiment, runs, folder)
            write_report(resolved, runs, folder)
        tried += _tried(experiment, runs, setting)
    rows = [{"rule": t.rule, **t.setting, "validation": t.validation, "test": t.test} for t in tried]
    (out / "sweep.csv").write_text(table(rows, "csv"))
    console.print(_best(tried, Score.of(experiment), console.width))
    console.print(f"All results: {out / 'sweep.csv'}", markup=False, soft_wrap=True)
    return tried


def _with(path: Path, setting: Setting) -> Experiment:
    """Return the experiment with `setting` and a validation part."""
    plain = {key: value for key, value in setting.items() if not key.startswith(RULES)}
    experiment = read(path, plain)
    if not experiment.evaluate.validation:
        experiment = read(path, {**plain, "evaluate.validation": VALIDATION_SHARE})
    parameters = {key.removeprefix(RULES): value for key, value in setting.items() if key.startswith(RULES)}
    if not parameters:
        return experiment
    tables: list[dict[str, Any]] = []
    used: set[str] = set()
    for rule in experiment.rules:
        known = {field.name for field in fields(rule.make())}
        own = {name: value for name, value in parameters.items() if name in known}
        used |= own.keys()
        own_table = rule.model_dump(exclude_defaults=True)
        tables.append({**own_table, "parameters": {**own_table.get("parameters", {}), **own}})
    if unused := parameters.keys() - used:
        raise ValueError(f"No rule of the experiment has the parameter {min(unused)!r}; correct rules.{min(unused)}.")
    return Experiment(**{**experiment.model_dump(exclude={"rules"}), "rules": tables})


def _tried(experiment: Experiment, runs: Sequence[FinishedRun], setting: Setting) -> Iterator[Tried]:
    key = VALIDATION + Score.of(experiment).name
    skipped = experiment.rounds - experiment.evaluate.last
    for rule in dict.fromkeys(run.rule for run in runs):
        own = [run for run in runs if run.rule == rule]
        tests = [r.server[key] for run in own for r in run.records if r.round > skipped and key in r.server]
        if not tests:
            raise ValueError(
                f"The server cannot validate the model of {rule!r}, of which layers stay at the clients; leave this "
                "rule out of the sweep."
            )
        yield Tried(rule, setting, float(np.mean(tests)), float(np.mean([run.final for run in own])))


def _best(tried: Sequence[Tried], score: Score, width: int) -> Table:
    """Return a table of each rule's best setting, by the validation part."""
    best = [
        max((each for each in tried if each.rule == rule), key=lambda each: score.rank(each.validation))
        for rule in dict.fromkeys(each.rule for each in tried)
    ]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rule", "best setting", f"validation {score.name}", f"test {score.name}"):
        shown.add_column(column, justify="right" if " " in column and "setting" not in column else "left")
    for each in sorted(best, key=lambda each: -score.rank(each.validation)):
        cells = (each.rule, _text(each.setting), score.text(each.validation), score.text(each.test))
        shown.add_row(*map(escape, cells))
    return shown


def _split(values: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    return [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]


def _text(setting: Setting) -> str:
    return ", ".join(f"{key} = {value}" for key, value in setting.items())


def _slug(setting: Setting) -> str:
    return re.sub(r"[^A-Za-z0-9.=,]+", "-", ",".join(f"{key}={value}" for key, value in setting.items()))
