"""The commands `corymb simulate`, `corymb compare` and `corymb results`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corymb.simulations.data.sources import DIGITS
from corymb.simulations.experiments.reader import parse_change, read, shipped
from corymb.simulations.experiments.resolved import Resolved, resolve
from corymb.simulations.grid.app_folder import load_app, run_app
from corymb.simulations.results.claims import findings, put_into, table
from corymb.simulations.results.client_results import ClientResults, client_results, columns_of, without_score
from corymb.simulations.results.folder import (
    FinishedRun,
    check_results,
    collect,
    finished_runs,
    journal_folder,
    prepare,
    rounds_in,
    write,
)
from corymb.simulations.results.never_counted import never_counted
from corymb.simulations.results.plots import draw_all
from corymb.simulations.results.report import write_report
from corymb.simulations.results.runner import Plan, run_all
from corymb.simulations.results.stored import is_finished
from corymb.simulations.results.summary import experiments_under, further_metrics, names_of, scores, summary_rows
from corymb.simulations.results.summary import table as summary_as

FIGURES = ("pdf", "svg", "png")
MAX_SENTENCES = 3  # about clients that never counted; the report has all


def simulate_experiments(
    paths: list[Path],
    changes: list[str],
    out: Path | None,
    jobs: int,
    console: Console,
    extra: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> None:
    """Run the experiments in `paths`, print their rankings, and write their results.

    `changes` are "key=value" from the command line, `extra` further changes as a table. The results go to `out`, or
    to `out`/NAME if there are several experiments; without `out`, to runs/NAME. With `resume`, finished runs in these
    folders are kept, and unfinished ones go on after their last round.
    """
    settings = dict(map(parse_change, changes)) | dict(extra or {})
    experiments = [read(path, settings) for path in paths]
    if len({experiment.name for experiment in experiments}) < len(experiments):
        raise ValueError("Two experiments have the same name and would share a folder; run them one at a time.")
    folders = [
        out if out and len(experiments) == 1 else (out or Path("runs")) / experiment.name for experiment in experiments
    ]
    plans = [(resolve(experiment), folder) for experiment, folder in zip(experiments, folders, strict=True)]
    for note in dict.fromkeys(note for resolved, _ in plans for note in resolved.notes):
        console.print(f"Data: {note}", markup=False, soft_wrap=True)
    reports = [
        (resolved, runs, write_report(resolved, runs, folder))
        for (resolved, folder), runs in zip(plans, _run_plans(plans, jobs, console, resume), strict=True)
    ]
    for resolved, runs, report in reports:
        if len(reports) > 1:
            console.print(f"[bold]{escape(resolved.experiment.name)}[/bold]")
        console.print(_ranking(runs))
        if results := client_results(runs):
            console.print(client_table(results))
            if sentence := without_score(results):
                console.print(sentence, markup=False, soft_wrap=True)
        for sentence in never_counted(runs, resolved)[:MAX_SENTENCES]:
            console.print(sentence, markup=False, soft_wrap=True)
        console.print(f"Report: {report}", soft_wrap=True, markup=False)


def _run_plans(plans: list[Plan], jobs: int, console: Console, resume: bool = False) -> Iterator[list[FinishedRun]]:
    """Run each plan, write its folder as soon as its last run ends, and yield its runs."""
    for _, folder in plans:
        check_results(folder)
    for resolved, folder in plans:  # earlier results move only after all checks
        if moved := prepare(resolved.experiment, folder, resume):
            console.print(f"Earlier results are in {moved}.", markup=False, soft_wrap=True)
    try:
        with closing(run_all(plans, console, jobs)) as finished:
            for (resolved, folder), runs in zip(plans, finished, strict=True):
                write(resolved.experiment, runs, folder)
                yield runs
    except (KeyboardInterrupt, SystemExit):
        for resolved, folder in plans:
            console.print(_how_far(resolved, folder), markup=False, soft_wrap=True)
        raise


def _how_far(resolved: Resolved, folder: Path) -> str:
    """Return how much of an experiment is finished, for a user who has stopped it."""
    experiment = resolved.experiment
    rounds = [rounds_in(journal_folder(folder, rule, seed)) for rule in experiment.rules for seed in experiment.seeds]
    finished = sum(number >= experiment.rounds for number in rounds)
    return (
        f"{experiment.name}: {finished} of {len(rounds)} runs are finished, and {sum(rounds)} of "
        f"{experiment.rounds * len(rounds)} rounds. To go on, run the same command with --resume."
    )


def _ranking(runs: list[FinishedRun]) -> Table:
    """Return a table of the rules of an experiment, best first."""
    results = scores(runs)
    score = runs[0].score
    best = max(results, key=lambda rule: score.rank(results[rule][0]))
    has_deviation = len({run.seed for run in runs}) > 1
    ranking = Table(box=None, pad_edge=False, header_style="bold")
    ranking.add_column("rule")
    ranking.add_column(score.title, justify="right")
    further = further_metrics(runs)
    for other in further:
        ranking.add_column(other.short_title, justify="right")
    for rule, (mean, deviation) in sorted(results.items(), key=lambda item: -score.rank(item[1][0])):
        style = "bold" if rule == best else ""
        shown = score.text(mean) + (f" ± {score.text(deviation)}" if has_deviation else "")
        ranking.add_row(escape(rule), shown, *(by_rule[rule] for by_rule in further.values()), style=style)
    return ranking


def client_table(results: list[ClientResults]) -> Table:
    """Return a table of the clients' own tests under each rule, best first."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="")
    table.title = f"\n{results[0].score.name} at the clients"
    columns = columns_of(results)
    for name in columns:
        table.add_column(name, justify="left" if name == "rule" else "right")
    for each in results:
        table.add_row(*(escape(cell(each)) for cell in columns.values()))
    return table


def summary_of(folders: list[Path], kind: str) -> str:
    """Return the summary of the finished experiments in `folders`, and below, as one table of this `kind`.

    Raises `ValueError` for a folder without results.
    """
    places = [place for folder in folders for place in experiments_under(folder) or [folder]]
    finished = [finished_runs(place) for place in places]
    names = names_of([experiment for experiment, _ in finished], places)
    rows = []
    for name, (_, runs) in zip(names, finished, strict=True):
        named = {"experiment": name} if len(finished) > 1 else {}
        rows += [{**named, **row} for row in summary_rows(runs)]
    return summary_as(rows, kind)


def draw_figures(folder: Path, kind: str) -> list[Path]:
    """Draw the figures of the finished experiment in `folder` as "pdf", "svg" or "png" into `folder`/figures.

    Raises `ValueError` for another kind, and for a folder without results.
    """
    if kind not in FIGURES:
        raise ValueError(f"The format {kind!r} is unknown; use one of {', '.join(FIGURES)}.")
    experiment, runs = finished_runs(folder)
    place = folder / "figures"
    place.mkdir(exist_ok=True)
    return [place / name for name in draw_all(runs, resolve(experiment).first, place, kind)]


def measure_claims(
    names: list[str], data: Path | None, out: Path, document: Path | None, jobs: int, console: Console
) -> None:
    """Run the shipped experiments called `names` (default: all with claims), and print which claims hold.

    An experiment with results of the same settings in `out` is not run again. `document` also gets the table.
    """
    results = {}
    for name in names or shipped():
        experiment = read(Path(name))
        if experiment.claims:
            if experiment.data.source != DIGITS and ":" not in experiment.data.source:
                if data is None:
                    console.print(
                        f"{name}: skipped; give the folder that contains {experiment.data.source} with --data."
                    )
                    continue
                experiment = read(Path(name), {"data.source": str(data / experiment.data.source)})
            resolved = resolve(experiment)
            results[name] = (experiment, findings(resolved, _runs(resolved, out / name, jobs, console)))
    text = table(results)
    if document is not None:
        document.write_text(put_into(document.read_text() if document.exists() else "", text))
    console.print(text, markup=False, soft_wrap=True)


def _runs(resolved: Resolved, folder: Path, jobs: int, console: Console) -> list[FinishedRun]:
    """Return the runs of an experiment from `folder`; run it first if the folder does not have its results."""
    experiment = resolved.experiment
    if is_finished(experiment, folder):
        return collect(experiment, folder)
    console.print(f"{experiment.name}: {experiment.setting}", markup=False)
    (runs,) = _run_plans([(resolved, folder)], jobs, console)
    return runs


def simulate_app(folder: Path, nodes: int, changes: list[str], workers: int, console: Console) -> None:
    """Run the Flower app in `folder` on a LocalGrid with this many `workers`; progress is in Flower's log."""
    app = load_app(folder)
    logging.getLogger("flwr").setLevel(logging.INFO)
    torch.set_num_threads(1)  # as for experiments: on shared cores, more threads are slower for small models
    started = time.monotonic()
    run_app(app, nodes, dict(map(parse_change, changes)), workers)
    console.print(f"Finished on {nodes} nodes in {time.monotonic() - started:.1f} s.")
