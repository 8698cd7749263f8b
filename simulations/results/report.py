"""The report of an experiment: one HTML file that opens offline."""

from __future__ import annotations

import base64
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from corymb.server.rule_settings import RuleSettings
from corymb.simulations.experiments.resolved import Resolved, is_pooled
from corymb.simulations.results.client_results import client_columns, client_results, columns_of, without_score
from corymb.simulations.results.folder import FinishedRun
from corymb.simulations.results.never_counted import never_counted
from corymb.simulations.results.plots import draw_all
from corymb.simulations.results.summary import further_metrics, scores


def _settings(rule: RuleSettings) -> str:
    """Return the rule with its parameters, and the settings of `[train]` that it overrides."""
    pooled = ["one client with the examples of all"] * is_pooled(rule)
    return ", ".join([str(rule.make()), *pooled, *(f"train.{key} = {value}" for key, value in rule.train.items())])


def _participants(runs: list[FinishedRun], rules: Collection[str]) -> str:
    """Return how many clients counted in a round of `rules` on average: "20.0", or "5.0 to 20.0" if rules differ."""
    counts = {
        rule: [len(record.admitted) for run in runs if run.rule == rule for record in run.records] for rule in rules
    }
    means = sorted({f"{np.mean(each):.1f}" for each in counts.values() if each}, key=float)
    return " to ".join(dict.fromkeys([means[0], means[-1]])) if means else "no"


def write_report(resolved: Resolved, runs: list[FinishedRun], folder: Path) -> Path:
    """Draw the plots into `folder`, and write and return `report.html`, which embeds them."""
    experiment, scenario = resolved.experiment, resolved.first
    plots = draw_all(runs, scenario, folder)
    results, tested = scores(runs), client_results(runs)
    score, further = runs[0].score, further_metrics(runs)
    best = max(results, key=lambda rule: score.rank(results[rule][0]))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        experiment=experiment,
        score=score,
        clients=len(scenario.names),
        notes=resolved.notes,
        never_counted=never_counted(runs, resolved),
        participants=_participants(runs, [rule.title for rule in experiment.rules if not is_pooled(rule)]),
        others=[other.short_title for other in further],
        rows=[
            {
                "title": rule.title,
                "mean": score.text(results[rule.title][0]),
                "deviation": score.text(results[rule.title][1]),
                "others": [by_rule[rule.title] for by_rule in further.values()],
                "seconds": np.mean([run.wall_seconds for run in runs if run.rule == rule.title]),
                "settings": _settings(rule),
                "best": rule.title == best,
            }
            for rule in sorted(experiment.rules, key=lambda rule: -score.rank(results[rule.title][0]))
        ],
        client_columns=columns_of(tested) if tested else {},
        client_names=client_columns(tested),
        tested=tested,
        without_score=without_score(tested),
        plots=[
            {"caption": caption, "data": base64.b64encode((folder / name).read_bytes()).decode()}
            for name, caption in plots.items()
        ],
        runs=runs,
        config=(folder / "config.toml").read_text(),
        version=version("corymb"),
        flwr=version("flwr"),
        torch=version("torch"),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path
