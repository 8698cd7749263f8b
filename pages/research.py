"""The data of the researcher's page: the runs of finished experiments, as one JSON value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from corymb.client.local_work import algorithm_of
from corymb.pages.operator import CODES
from corymb.protocol.run_config import flatten
from corymb.server import RoundRecord
from corymb.server.rounds.drift import COSINE, NORM
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.scenario import scenario_of
from corymb.simulations.results.client_results import client_results
from corymb.simulations.results.folder import FinishedRun, finished_runs
from corymb.simulations.results.score import NEW_CLIENT, VIRTUAL
from corymb.simulations.results.summary import names_of, summary_rows, table
from corymb.simulations.results.sweep import RULES

MAX_CLIENTS = 400  # in rasters and heat maps
DIGITS = 5  # of numbers in the page


def payload(folders: Sequence[Path]) -> dict[str, Any]:
    """Return all that the page shows of the finished experiments in `folders`.

    Raises `ValueError` for a folder without a finished experiment.
    """
    found = [finished_runs(folder) for folder in folders]
    names = names_of([experiment for experiment, _ in found], folders)
    configs = [
        flatten(experiment.model_dump(mode="json", exclude_none=True, exclude={"rules", "claims", "seeds"}))
        for experiment, _ in found
    ]
    parameters = [_parameters(experiment) for experiment, _ in found]
    titles = sorted({title for by_title in parameters for title in by_title})
    of_rules = {key for title in titles for key in _differing(by[title] for by in parameters if title in by)}
    differing = sorted(_differing(configs))
    return {
        "experiments": [
            _experiment(
                name, experiment, runs, {key: str(config.get(key, "")) for key in differing},
                {title: {key: str(values.get(key, "")) for key in of_rules} for title, values in by_title.items()},
            )
            for name, (experiment, runs), config, by_title in zip(names, found, configs, parameters, strict=True)
        ],
        "differing": differing,
        "parameters": sorted(of_rules),
    }  # fmt: skip


def _differing(configs: Iterable[dict[str, Any]]) -> set[str]:
    """Return the keys whose values are not the same in all `configs`."""
    known = list(configs)
    keys = {key for config in known for key in config}
    return {key for key in keys if len({str(config.get(key)) for config in known}) > 1}


def _parameters(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return for each rule's title its parameters and those of its algorithm at the clients, named as in sweeps."""
    return {
        rule.title: {
            f"{RULES}{field.name}": getattr(part, field.name)
            for part in (rule.make(), algorithm_of(experiment.train_for(rule)))
            for field in fields(part)
        }
        for rule in experiment.rules
    }


def _experiment(
    name: str,
    experiment: Experiment,
    runs: list[FinishedRun],
    config: dict[str, str],
    parameters: dict[str, dict[str, str]],
) -> dict[str, Any]:
    score, rows = runs[0].score, summary_rows(runs)
    clients = [
        {
            "rule": each.rule,
            "values": {name: _round(value) for name, value in each.by_client.items() if isfinite(value)},
        }
        for each in client_results(runs)
    ]
    return {
        "name": name,
        "setting": experiment.setting,
        "score": score.key,
        "lower": score.lower_is_better,
        "percent": score.is_percent,
        "config": config,
        "summary": {kind: table(rows, kind) for kind in ("markdown", "latex", "csv")},
        "rows": [{key: _shown(value) for key, value in row.items()} for row in rows],
        "clients": clients,
        "labels": _labels(experiment),
        "runs": [_run(run, config | parameters.get(run.rule, {}), detailed=run.seed == runs[0].seed) for run in runs],
    }


def _run(run: FinishedRun, config: dict[str, str], detailed: bool) -> dict[str, Any]:
    """Return a run: the curves of its metrics, and if `detailed` each client's verdicts and weights."""
    up_to_now, megabytes = 0.0, []
    for record in run.records:
        up_to_now += (record.bytes_up + record.bytes_down) / 1e6
        megabytes.append(_round(up_to_now))
    virtual = [record.notes.get(VIRTUAL) for record in run.records]
    names = sorted({name for record in run.records for name in record.server})
    found: dict[str, Any] = {
        "rule": run.rule,
        "seed": run.seed,
        "config": config,
        "final": _round(run.final) if isfinite(run.final) else None,
        "rounds": [record.round for record in run.records],
        "megabytes": megabytes,
        "virtual": [_round(value) for value in virtual if value is not None] if None not in virtual else [],
        "metrics": {
            **{name: [_optional(record.server, name) for record in run.records] for name in names},
            "train loss": [_optional(record.train, "loss") for record in run.records],
        },
    }
    return {**found, **_per_client(run.records)} if detailed else found


def _per_client(records: Sequence[RoundRecord]) -> dict[str, Any]:
    """Return the clients, a character for each client and round, the weights as [round, client, share of most], and the
    drift as [round, client, length of the update, cosine], if the run has recorded it.
    """
    clients = sorted({verdict.node for record in records for verdict in record.verdicts})[:MAX_CLIENTS]
    places = {name: place for place, name in enumerate(clients)}
    lines = [[" "] * len(records) for _ in clients]
    weights: list[tuple[int, int, float]] = []
    drift: list[tuple[int, int, float, float]] = []
    for index, record in enumerate(records):
        most = max((verdict.weight or 0.0 for verdict in record.verdicts), default=0.0)
        for verdict in record.verdicts:
            if verdict.node in places:
                lines[places[verdict.node]][index] = CODES.get(verdict.code, "x")
                if verdict.weight and most:
                    weights.append((index, places[verdict.node], _round(verdict.weight / most)))
                if COSINE in verdict.metrics and NORM in verdict.metrics:
                    both = _round(verdict.metrics[NORM]), _round(verdict.metrics[COSINE])
                    drift.append((index, places[verdict.node], *both))
    return {"clients": clients, "raster": ["".join(line) for line in lines], "weights": weights, "drift": drift}


def _labels(experiment: Experiment) -> dict[str, Any]:
    """Return the label distribution of the first seed's clients, and who is hostile; empty without the data."""
    try:
        scenario = scenario_of(experiment, experiment.data.load(experiment.task.kind), experiment.seeds[0])
    except Exception:  # the data are gone, or a user's own function fails
        return {}
    counts = scenario.labels * scenario.population.sizes[:, None]
    hostile = [scenario.names[client] for client in scenario.hostile]
    counted = counts[:MAX_CLIENTS].round().astype(int).tolist()
    return {"clients": scenario.names[:MAX_CLIENTS], "counts": counted, "hostile": hostile}


def _optional(metrics: Any, name: str) -> float | None:
    is_known = name in metrics and name != NEW_CLIENT and isfinite(metrics[name])  # JSON has no NaN
    return _round(metrics[name]) if is_known else None


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if isnan(value) else f"{value:.4g}"
    return str(value)
