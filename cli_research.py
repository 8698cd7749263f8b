"""The commands for researchers beside `simulate` and `compare`: rules, sweeps, tables, figures, trackers and claims."""

from __future__ import annotations

from dataclasses import MISSING, fields
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

console = Console()

KINDS = {
    "blind": "weighs replies without seeing the models",
    "sighted": "sees all models of a round",
    "voting": "keeps the clients' models, which vote on each input",
    "clients": "FedAvg with a method of its own at the clients",
    "baseline": "a line to compare with, in experiments",
}
BASELINES = {
    "local": "Each client trains alone, and nothing is shared.",
    "central": "One client has the examples of all, as if the data were pooled.",
}
Jobs = Annotated[int, typer.Option(min=1, help="Number of runs in parallel, each in its own process.")]


def rules(
    name: Annotated[Optional[str], typer.Argument(help="A rule, to describe it.")] = None,  # noqa: UP045
) -> None:
    """List the aggregation rules, or describe one with its parameters and requirements.

    Example: corymb rules fedau
    """
    from corymb.strategies.rules import rule_class

    listed = _listed()
    if name is not None:
        kind, rule = listed[name] if name in listed else (rule_class(name).kind, rule_class(name))
        console.print(_description(name, kind, rule), markup=False, highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rule", "kind", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column != "what it does")
    for each, (kind, rule) in listed.items():
        table.add_row(each, kind, _documentation(rule).partition("\n")[0])
    console.print(table, highlight=False)
    kinds = "\n".join(f"{kind:9} {meaning}" for kind, meaning in KINDS.items())
    console.print(f"\n{kinds}\n\n`corymb rules NAME` describes one.", markup=False, highlight=False)


def _listed() -> dict[str, tuple[str, Any]]:
    """Return what `rules` of an experiment may name: the kind of each, and its class or, for a baseline, its text."""
    from corymb.client.algorithms.known import algorithm_class
    from corymb.protocol.train_settings import CLIENT_METHODS
    from corymb.strategies import known_rules

    methods = {name: ("clients", algorithm_class(name)) for name in CLIENT_METHODS}
    baselines = {name: ("baseline", text) for name, text in BASELINES.items()}
    return {**{name: (rule.kind, rule) for name, rule in known_rules().items()}, **methods, **baselines}


def _documentation(rule: Any) -> str:
    return rule if isinstance(rule, str) else getdoc(rule) or ""


def _description(name: str, kind: str, rule: Any) -> str:
    """Return what `corymb rules NAME` says of a rule or a method at the clients, by its class, or of a baseline."""
    paragraphs = [" ".join(paragraph.split()) + "\n" for paragraph in _documentation(rule).split("\n\n")]
    lines = [name + "\n", *paragraphs, f"Kind: {kind} ({KINDS[kind]})."]
    if isinstance(rule, str):
        return "\n".join(lines)
    if getattr(rule, "needs_proxy", False):
        lines.append("Needs labelled examples at the server (proxy data).")
    if algorithm := getattr(rule, "client_algorithm", ""):
        lines.append(f"The clients run the algorithm {algorithm!r}.")
    if "masked" in getattr(rule, "privacy_modes", ()):
        lines.append("Also works on sums of masked updates (secure aggregation).")
    parameters = [
        f"  {field.name}" + (f" = {field.default!r}" if field.default is not MISSING else " (required)")
        for field in fields(rule)
    ]
    return "\n".join([*lines, "Parameters:" if parameters else "No parameters.", *parameters])


def sweep(
    experiment: Annotated[str, typer.Argument(help="A TOML file or the name of a shipped experiment.")],
    values: Annotated[list[str], typer.Argument(metavar="KEY=VALUE,VALUE,...", help="The values to try for a key.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the results (default: runs/NAME-sweep)."),
    ] = None,
    jobs: Jobs = 1,
    trials: Annotated[int, typer.Option(min=1, help="Number of settings to try for each rule, with ranges.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
) -> None:
    """Run an experiment for some values of its settings, and choose the best of each rule.

    The choice is made on a validation part of the training examples, never on the test set. Lists of values are tried
    in all combinations. With a range, KEY=LOW..HIGH, Optuna chooses what to try.

    Example: corymb sweep demo train.learning_rate=0.01,0.03,0.1 rules.cutoff=10,50

    Example: corymb sweep demo train.learning_rate=0.001..1 --trials 30
    """
    from corymb.simulations.results.sweep import parse_grid
    from corymb.simulations.results.sweep import sweep as run_sweep
    from corymb.simulations.results.tuning import has_range, parse_space, tune

    folder = out or Path("runs") / f"{Path(experiment).stem}-sweep"
    if has_range(values):
        if jobs != 1:
            raise ValueError("--jobs applies to lists of values; leave it out with a range.")
        tune(Path(experiment), parse_space(values), folder, trials, console, force)
        return
    run_sweep(Path(experiment), parse_grid(values), folder, jobs, console, force)


def summary_table(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of experiments.")],
    kind: Annotated[str, typer.Option("--format", help="markdown, latex or csv.")] = "markdown",
) -> None:
    """Print the summary of finished experiments, a row per rule.

    Example: corymb table runs/demo --format latex
    """
    from corymb.simulations.results.commands import summary_of

    typer.echo(summary_of(folders, kind), nl=False)


def figures(
    folder: Annotated[Path, typer.Argument(help="The results folder of an experiment.")],
    kind: Annotated[str, typer.Option("--format", help="pdf, svg or png.")] = "pdf",
) -> None:
    """Draw the figures of a finished experiment for a paper, into FOLDER/figures.

    Example: corymb figures runs/demo --format svg
    """
    from corymb.simulations.results.commands import draw_figures

    for path in draw_figures(folder, kind):
        console.print(str(path), markup=False, soft_wrap=True)


def export(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of experiments.")],
    tracker: Annotated[str, typer.Option("--to", help="tensorboard, mlflow, trackio or wandb.")] = "tensorboard",
    place: Annotated[Path, typer.Option(help="Folder of TensorBoard's files or MLflow's store.")] = Path("tracked"),
) -> None:
    """Copy finished experiments into an experiment tracker: a run for each rule and seed, with its metrics per round.

    Example: corymb export runs/demo --to mlflow
    """
    from corymb.simulations.results.trackers import export as export_runs

    number = export_runs(folders, tracker, place)
    where = f", into {place}" if tracker in ("tensorboard", "mlflow") else ""
    console.print(f"Copied {number} runs to {tracker}{where}.", markup=False, soft_wrap=True)


def results(
    experiments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Names of shipped experiments (default: all)."),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with one subfolder per data set, e.g. fashion-mnist."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the runs; experiments with results there are not run again.")
    ] = Path("runs/results"),
    document: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Markdown file to write the table into, between its markers."),
    ] = None,
    jobs: Jobs = 1,
) -> None:
    """Measure the claims of the papers, and report which hold.

    EXPERIMENTS are names of shipped experiments (default: all).
    """
    from corymb.simulations.results.commands import measure_claims

    measure_claims(experiments or [], data, out, document, jobs, console)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Results folders of experiments.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write a page that compares finished experiments: one file, with the data inside, that opens offline.

    Example: corymb report runs/demo runs/other --out comparison.html

    Example: corymb report runs/demo-sweep
    """
    from corymb.pages.report import write_report

    path = write_report(folders, out)
    console.print(f"Wrote {path}, {path.stat().st_size / 1e6:.1f} MB.", markup=False, soft_wrap=True)
