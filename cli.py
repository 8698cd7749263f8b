"""The `corymb` command: mounts what the rooms offer."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from corymb.strategies import known_rules

app = typer.Typer(
    help="Federated learning with pluggable aggregation rules, on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Changes = Annotated[
    Optional[list[str]],  # noqa: UP045  # typer reads this form
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set partition.alpha=0.5; repeatable."),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder for the results, or with several experiments for one folder each (default: runs/NAME)."),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")]


@app.command()
def rules() -> None:
    """List the aggregation rules: kind, parameters with defaults, paper; "masked" ones sum under masks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rule", "kind", "parameters", "paper", "remarks"):
        table.add_column(column, overflow="fold")
    for name, rule in known_rules().items():
        parameters = "\n".join(
            f"{field.name} = {field.default!r}" if field.default is not MISSING else field.name
            for field in fields(rule)
        )
        paper = (rule.__doc__ or "").strip().partition(":")[0]  # "Author year, Algorithm: the idea"
        remarks = ["needs proxy data"] * rule.needs_proxy + ["masked"] * ("masked" in rule.privacy_modes)
        table.add_row(name, rule.kind, parameters or "-", paper, ", ".join(remarks))
    console.print(table)


@app.command()
def simulate(
    experiments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="TOML files, or names of shipped experiments (default: demo)."),
    ] = None,
    changes: Changes = None,
    out: Out = None,
    jobs: Jobs = 1,
    app_folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--app", help="Run the Flower app in this folder instead; --set changes its config."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Clients, with --app.")] = 10,
) -> None:
    """Run experiments, or any Flower app, on this machine."""
    from corymb.simulations.results.commands import simulate_app, simulate_experiments

    if app_folder is not None:
        if out is not None or jobs != 1:
            raise ValueError("--out and --jobs belong to experiments; an app (--app) writes what it writes.")
        simulate_app(app_folder, nodes, changes or [], console)
    else:
        simulate_experiments(list(map(Path, experiments or ["demo"])), changes or [], out, jobs, console)


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped experiment.")] = "demo",
    rules: Annotated[str, typer.Option(help="Rules to compare, e.g. fedavg,fedau,ida (default: the file's).")] = "",
    seeds: Annotated[int, typer.Option(min=0, help="How many seeds (default: the file's).")] = 0,
    changes: Changes = None,
    out: Out = None,
    jobs: Jobs = 1,
) -> None:
    """Run several rules on the same data, participation and seeds, and rank them."""
    from corymb.simulations.results.commands import simulate_experiments

    extra = {"rules": [rule.strip() for rule in rules.split(",")]} if rules else {}
    simulate_experiments(
        [Path(experiment)], changes or [], out, jobs, console, extra | ({"seeds": seeds} if seeds else {})
    )


new = typer.Typer(help="Begin something of your own.", no_args_is_help=True)
app.add_typer(new, name="new")


@new.command("rule")
def new_rule(
    name: Annotated[str, typer.Argument(help="What experiments call it: small letters, digits, underscores.")],
    kind: Annotated[str, typer.Option(help="sighted sees every model of a round, blind none.")] = "sighted",
    out: Annotated[Path, typer.Option(help="Folder to make it in.")] = Path(),
) -> None:
    """Make a package folder with a rule, its entry point, its test and an experiment."""
    from corymb.simulations.scaffold.new_rule import new_rule as make

    folder = make(name, kind, out)
    console.print(
        f"Made {folder}/. Next:\n  pip install -e {folder}\n  pytest {folder}\n  corymb compare {folder}/{name}.toml",
        markup=False,
        soft_wrap=True,
    )


@app.command()
def results(
    experiments: Annotated[Optional[list[str]], typer.Argument(help="Shipped experiments (default: all).")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="Folder of the data sets, by name: fashion-mnist.")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="Folder for the runs; finished ones there are not run again.")] = Path(
        "runs/results"
    ),
    document: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Markdown file to put the table into, between its markers."),
    ] = None,
    jobs: Jobs = 1,
) -> None:
    """Measure what the papers claim, and tell what held."""
    from corymb.simulations.results.commands import measure_claims

    measure_claims(experiments or [], data, out, document, jobs, console)


def main() -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
