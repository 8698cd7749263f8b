"""A sweep over ranges of values with Optuna, which searches for each rule by itself and stops what will not win."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from corymb.server import RoundRecord
from corymb.simulations.experiments.reader import parse_change
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.folder import prepare, write
from corymb.simulations.results.model_tests import VALIDATION
from corymb.simulations.results.runner import run_all
from corymb.simulations.results.score import Score
from corymb.simulations.results.sweep import (
    RULES,
    Combination,
    Setting,
    Tried,
    as_text,
    finish,
    only,
    parameters_of,
    parse_grid,
    tried_of,
    with_setting,
)

STUDIES = "studies.db"
SPAN = 10  # ranges that span this factor or more are searched by their logarithm
WARMUP = 3  # tests before a trial may be stopped


class Range(NamedTuple):
    """The numbers from `low` to `high`, both included; whole numbers if both are."""

    low: float
    high: float


Space = dict[str, Range | list[Any]]


def has_range(texts: Sequence[str]) -> bool:
    """Return whether a text has the form `key=low..high`."""
    return any(_range_in(text) for text in texts)


def parse_space(texts: Sequence[str]) -> Space:
    """Parse `key=low..high` and `key=value,value,...`. Raises `ValueError` for other texts and empty ranges."""
    space: Space = {}
    for text in texts:
        found = _range_in(text)
        if found is None:
            space |= parse_grid([text])
            continue
        low, high = (parse_change(f"{found[1]}={end}")[1] for end in found.groups()[1:])
        if not low < high:
            raise ValueError(f"The range {text!r} is empty; write the lower end first.")
        space[found[1]] = Range(low, high)
    return space


def _range_in(text: str) -> re.Match[str] | None:
    number = r"([-+]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
    return re.fullmatch(rf"([^=]+)={number}\.\.{number}", text)


def tune(path: Path, space: Space, out: Path, trials: int, console: Console, force: bool = False) -> list[Tried]:
    """Try `trials` settings of each rule of the experiment in `path`, chosen by Optuna; print the best of each.

    A trial that is worse than the median of the earlier ones after as many rounds of the first seed is stopped. The
    studies are in `out`, with a folder for each trial; those of an earlier call count, unless `force` is given. Raises
    `ImportError` if Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ImportError("ranges need Optuna; run pip install 'corymb[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    if force:
        (out / STUDIES).unlink(missing_ok=True)
    first = {key: values[0] if isinstance(values, list) else values.low for key, values in space.items()}
    whole = with_setting(path, first).experiment  # also checks that each parameter has a rule
    score = Score.of(whole)
    tried: list[Tried] = []
    for rule in whole.rules:
        own = {k: v for k, v in space.items() if not k.startswith(RULES) or k[len(RULES) :] in parameters_of(rule)}
        study = optuna.create_study(
            storage=f"sqlite:///{(out / STUDIES).resolve()}",
            study_name=rule.title,
            load_if_exists=True,
            direction="minimize" if score.lower_is_better else "maximize",
            sampler=optuna.samplers.TPESampler(seed=0),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=WARMUP * whole.evaluate.every),
        )
        asked = json.dumps([own, only(whole, [rule]).model_dump(mode="json")], default=str)
        if study.user_attrs.setdefault("asked", asked) != asked:
            raise ValueError(f"{out} has trials of another search; give --force to begin anew, or another --out.")
        study.set_user_attr("asked", asked)
        objective = partial(_try, path, first, rule.title, own, out, console)
        over = [trial for trial in study.trials if trial.state.is_finished()]
        study.optimize(objective, max(0, (trials if own else 1) - len(over)))
        stopped = sum(trial.state is optuna.trial.TrialState.PRUNED for trial in study.trials)
        console.print(f"{rule.title}: {len(study.trials)} trials, {stopped} of them stopped early", markup=False)
        tried += [
            Tried(rule.title, {key: trial.params[key] for key in own}, trial.value, trial.user_attrs["test"])
            for trial in study.trials
            if trial.value is not None and "test" in trial.user_attrs
        ]
    finish(tried, score, out, console)
    return tried


def _try(
    path: Path, first: Setting, rule: str, space: Mapping[str, Range | list[Any]], out: Path, console: Console,
    trial: Any,
) -> float:  # fmt: skip
    """Run one trial of the rule with this title, and return its score on the validation part."""
    import optuna

    setting = {key: _suggested(trial, key, values) for key, values in space.items()}
    console.print(f"{rule}, trial {trial.number}: {as_text(setting)}", markup=False, soft_wrap=True)
    whole = with_setting(path, {**first, **setting})
    mine = [each for each in whole.experiment.rules if each.title == rule]
    experiment = only(whole.experiment, mine)
    key = VALIDATION + Score.of(experiment).key

    def on_round(seed: int, record: RoundRecord) -> None:
        if seed == experiment.seeds[0] and key in record.server and record.round < experiment.rounds:
            trial.report(record.server[key], record.round)
            if trial.should_prune():
                raise optuna.TrialPruned

    folder = out / f"{mine[0].slug}-{trial.number:03d}"
    resolved = resolve(experiment)
    prepare(experiment, folder, resume=False)
    (runs,) = run_all([(resolved, folder)], console, on_round=on_round)
    write(experiment, runs, folder)
    (tried,) = tried_of(Combination(experiment, {rule: setting}), runs)
    if isnan(tried.validation):  # the model has diverged
        raise optuna.TrialPruned
    trial.set_user_attr("test", tried.test)
    return tried.validation


def _suggested(trial: Any, key: str, values: Range | list[Any]) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    by_logarithm = values.low > 0 and values.high >= SPAN * values.low
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(key, values.low, values.high, log=by_logarithm)
    return trial.suggest_float(key, values.low, values.high, log=by_logarithm)
