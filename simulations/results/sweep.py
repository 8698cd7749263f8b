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

from corymb.client import TrainSettings
from corymb.client.local_work import algorithm_of
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import parse_change, read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.simulations.results.folder import FinishedRun, collect, final_score, prepare, write
from corymb.simulations.results.model_tests import VALIDATION
from corymb.simulations.results.report import write_report
from corymb.simulations.results.runner import run_all
from corymb.simulations.results.score import Score
from corymb.simulations.results.stored import is_finished
from corymb.simulations.results.summary import table

VALIDATION_SHARE = 0.1
CONDITIONS = ("attack", "data", "devices", "fraction", "partition", "participation")  # tables of what rules meet
RULES = "rules."  # before the name of a parameter of the rules that have it
Setting = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """A rule under one setting: its scores on the validation part and on the test part, each a mean over seeds."""

    rule: str
    setting: Setting
    validation: float
    test: float


@dataclass(frozen=True)
class Combination:
    """One combination of the values: the experiment, and the values that each of its rules has, by its title."""

    experiment: Experiment
    settings: Mapping[str, Setting]


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

    A key `rules.NAME` sets the parameter NAME of the rules, or of the algorithms at their clients, that have it; the
    other rules run once for all its values. All combinations are checked before the first one runs. Each has its own
    folder in `out`; what is finished there is not run again, unless `force` is given, and unfinished runs go on. `out`
    also gets `sweep.csv`. Without a validation part in the experiment, a tenth of the training examples becomes one.
    """
    tried: list[Tried] = []
    combinations = _combinations(path, grid)
    for number, (setting, combination) in enumerate(combinations, 1):
        experiment, folder = combination.experiment, out / _slug(setting)
        console.print(f"{number}/{len(combinations)}  {as_text(setting)}", markup=False, soft_wrap=True)
        runs = None if force or not is_finished(experiment, folder) else collect(experiment, folder)
        if runs is None:
            resolved = resolve(experiment)
            prepare(experiment, folder, resume=not force)
            (runs,) = run_all([(resolved, folder)], console, jobs)
            write(experiment, runs, folder)
            write_report(resolved, runs, folder)
        tried += tried_of(combination, runs)
    finish(tried, Score.of(experiment), out, console)
    return tried


def finish(tried: Sequence[Tried], score: Score, out: Path, console: Console) -> None:
    """Write all results to `sweep.csv` in `out`, and print the best of each rule under each condition."""
    rows = [{"rule": t.rule, **t.setting, "validation": t.validation, "test": t.test} for t in tried]
    (out / "sweep.csv").write_text(table(rows, "csv"))
    console.print(best_settings(tried, score))
    console.print(f"All results: {out / 'sweep.csv'}", markup=False, soft_wrap=True)


def _combinations(path: Path, grid: Mapping[str, list[Any]]) -> list[tuple[Setting, Combination]]:
    """Return each combination of values with the rules that no earlier one has run under the same settings."""
    seen: set[str] = set()
    found = []
    for values in product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        whole = with_setting(path, setting)
        new = []
        for rule in whole.experiment.rules:
            key = whole.experiment.model_copy(update={"rules": [rule]}).model_dump_json()
            if key not in seen:
                new.append(rule)
            seen.add(key)
        if new:
            found.append((setting, Combination(only(whole.experiment, new), whole.settings)))
    return found


def only(experiment: Experiment, rules: list[ExperimentRule]) -> Experiment:
    """Return the experiment with these of its rules."""
    return experiment.model_copy(update={"rules": rules, "claims": []})


def with_setting(path: Path, setting: Setting) -> Combination:
    """Return the experiment in `path` with `setting` and a validation part.

    Raises `ValueError` if the setting is invalid, or if no rule has one of its parameters.
    """
    plain = {key: value for key, value in setting.items() if not key.startswith(RULES)}
    experiment = read(path, plain)
    if not experiment.evaluate.validation:
        experiment = read(path, {**plain, "evaluate.validation": VALIDATION_SHARE})
    parameters = {key.removeprefix(RULES): value for key, value in setting.items() if key.startswith(RULES)}
    tables: list[dict[str, Any]] = []
    settings: dict[str, Setting] = {}
    for rule in experiment.rules:
        own = {name: value for name, value in parameters.items() if name in parameters_of(rule)}
        settings[rule.title] = {**plain, **{RULES + name: value for name, value in own.items()}}
        tables.append(_with_parameters(rule, own))
    if unused := setting.keys() - {key for own in settings.values() for key in own}:
        name = min(unused).removeprefix(RULES)
        raise ValueError(f"No rule of the experiment has the parameter {name!r}; correct {min(unused)}.")
    return Combination(Experiment(**{**experiment.model_dump(exclude={"rules"}), "rules": tables}), settings)


def parameters_of(rule: ExperimentRule) -> set[str]:
    """Return the names of a rule's parameters, and of the settings of its algorithm at the clients."""
    return {
        field.name for part in (rule.make(), algorithm_of(rule.train_under(TrainSettings()))) for field in fields(part)
    }


def _with_parameters(rule: ExperimentRule, values: Setting) -> dict[str, Any]:
    """Return the table of `rule` with these values of its parameters and of the settings of its algorithm."""
    known = {field.name for field in fields(rule.make())}
    own = {name: value for name, value in values.items() if name in known}
    options = {name: value for name, value in values.items() if name not in known}
    table = rule.model_dump(exclude_defaults=True)
    if own:
        table["parameters"] = {**table.get("parameters", {}), **own}
    if options:
        train = table.get("train", {})
        table["train"] = {**train, "algorithm_options": {**train.get("algorithm_options", {}), **options}}
    return table


def tried_of(combination: Combination, runs: Sequence[FinishedRun]) -> Iterator[Tried]:
    """Yield what each rule of a combination has reached in its `runs`."""
    experiment = combination.experiment
    key = VALIDATION + Score.of(experiment).key
    skipped = experiment.rounds - experiment.evaluate.last
    for rule in dict.fromkeys(run.rule for run in runs):
        own = [run for run in runs if run.rule == rule]
        tests = [test for run in own if (test := final_score(run.records, key, skipped)) is not None]
        if len(tests) < len(own):
            raise ValueError(f"No test of {rule!r} measured {key!r}: it is not defined for the validation part.")
        final = float(np.mean([run.final for run in own]))
        yield Tried(rule, combination.settings[rule], float(np.mean(tests)), final)


def best_settings(tried: Sequence[Tried], score: Score) -> Table:
    """Return a table of each rule's best setting, by the validation part; under each condition, if there are several.

    What a rule meets, such as hostile clients, is a condition and no choice.
    """
    best: dict[tuple[str, str], tuple[str, Tried]] = {}
    for each in tried:
        is_met = {key: key.split(".")[0] in CONDITIONS for key in each.setting}
        met, chosen = (as_text({k: v for k, v in each.setting.items() if is_met[k] == kind}) for kind in (True, False))
        before = best.get((met, each.rule))
        if before is None or score.rank(each.validation) > score.rank(before[1].validation):
            best[met, each.rule] = chosen, each
    order = list(dict.fromkeys(met for met, _ in best))
    ranked = sorted(best.items(), key=lambda row: (order.index(row[0][0]), -score.rank(row[1][1].validation)))
    columns = {
        "condition": [met for (met, _), _ in ranked],
        "rule": [rule for (_, rule), _ in ranked],
        "best setting": [chosen for _, (chosen, _) in ranked],
        f"validation {score.name}": [score.text(each.validation) for _, (_, each) in ranked],
        f"test {score.name}": [score.text(each.test) for _, (_, each) in ranked],
    }
    shown = Table(box=None, pad_edge=False, header_style="bold")
    used = {title: cells for title, cells in columns.items() if any(cells)}
    for title in used:
        shown.add_column(title, justify="right" if title.endswith(score.name) else "left")
    for cells in zip(*used.values(), strict=True):
        shown.add_row(*map(escape, cells))
    return shown


def _split(values: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    return [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]


def as_text(setting: Setting) -> str:
    """Return the setting as `key = value, ...`."""
    return ", ".join(f"{key} = {value}" for key, value in setting.items())


def _slug(setting: Setting) -> str:
    return re.sub(r"[^A-Za-z0-9_.=,]+", "-", ",".join(f"{key}={value}" for key, value in setting.items()))
