"""The command line `corymb`."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from corymb.cli_deployment import join, provision, serve
from corymb.cli_federation import backup, doctor, order, restore, run, status
from corymb.cli_operators import alerts, app_hash, dashboard, model, supervisor
from corymb.cli_research import Jobs, export, figures, report, results, rules, summary_table, sweep
from corymb.cli_site import approve, audit, gate, site_page

app = typer.Typer(
    help="Federated learning with pluggable aggregation rules, on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Changes = Annotated[
    Optional[list[str]],  # noqa: UP045  # typer reads this form
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set train.steps=10. Can be repeated."),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Results folder; several experiments get subfolders OUT/NAME (default: runs/NAME)."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep finished runs of the same settings, and go on with unfinished ones.")
]


@app.command()
def simulate(
    experiments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="TOML files or names of shipped experiments (default: demo)."),
    ] = None,
    changes: Changes = None,
    out: Out = None,
    jobs: Jobs = 1,
    resume: Resume = False,
    app_folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--app", help="Run the Flower app in this folder instead of an experiment; --set changes its run config."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of clients, with --app.")] = 10,
    workers: Annotated[
        int, typer.Option(min=0, help="Number of processes that run clients, with --app (default: one per core).")
    ] = 0,
) -> None:
    """Run experiments, or any Flower app, on this machine.

    EXPERIMENTS are TOML files or names of shipped experiments (default: demo).
    """
    from corymb.simulations.cores import cores
    from corymb.simulations.results.commands import simulate_app, simulate_experiments

    if app_folder is not None:
        if out is not None or jobs != 1 or resume:
            raise ValueError("--out, --jobs and --resume apply to experiments only; leave them out with --app.")
        simulate_app(app_folder, nodes, changes or [], workers or cores(), console)
    else:
        simulate_experiments(list(map(Path, experiments or ["demo"])), changes or [], out, jobs, console, resume=resume)


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(help="A TOML file or the name of a shipped experiment.")] = "demo",
    rules: Annotated[
        str, typer.Option(help="Rules to compare, e.g. fedavg,fedau,ida (default: those of the experiment).")
    ] = "",
    seeds: Annotated[int, typer.Option(min=0, help="Number of seeds; 0: those of the experiment.")] = 0,
    changes: Changes = None,
    out: Out = None,
    jobs: Jobs = 1,
    resume: Resume = False,
) -> None:
    """Run several rules on the same data, participation and seeds, and rank them.

    EXPERIMENT is a TOML file or the name of a shipped experiment.
    """
    from corymb.simulations.results.commands import simulate_experiments

    extra: dict[str, Any] = {"rules": [rule.strip() for rule in rules.split(",")]} if rules else {}
    extra |= {"seeds": seeds} if seeds else {}
    simulate_experiments([Path(experiment)], changes or [], out, jobs, console, extra, resume)


new = typer.Typer(help="Create a new package from a template.", no_args_is_help=True)
app.add_typer(new, name="new")


@new.command("rule")
def new_rule(
    name: Annotated[str, typer.Argument(help="Name of the rule: lower-case letters, digits and underscores.")],
    kind: Annotated[
        str, typer.Option(help="sighted: the rule sees all models of a round; blind: it sees none.")
    ] = "sighted",
    out: Annotated[Path, typer.Option(help="Parent folder of the new package.")] = Path(),
) -> None:
    """Create a package with a rule, its entry point, a test and an experiment.

    NAME is the name of the rule: lower-case letters, digits and underscores.
    """
    from corymb.simulations.scaffold.new_rule import new_rule as create

    folder = create(name, kind, out)
    console.print(
        f"Created {folder}/. Next steps:\n  pip install -e {folder}\n  pytest {folder}\n"
        f"  corymb compare {folder}/{name}.toml",
        markup=False,
        soft_wrap=True,
    )


for command in (
    rules,
    sweep,
    figures,
    export,
    report,
    results,
    provision,
    serve,
    join,
    run,
    status,
    order,
    doctor,
    backup,
    restore,
    approve,
    gate,
    audit,
    supervisor,
    dashboard,
    alerts,
):
    app.command()(command)
app.command("table")(summary_table)
app.command("site")(site_page)
app.command("hash")(app_hash)
app.add_typer(model, name="model")


def main() -> None:
    """Run the command line. A mistake of use prints one line and exits with code 2; see `is_mistake_of_use`."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # runs `finally` blocks
    try:
        app()
    except Exception as error:
        from corymb.simulations.results.mistakes import cause_in_user_code, is_mistake_of_use

        if not is_mistake_of_use(error):
            raise
        if (cause := cause_in_user_code(error)) is not None:
            traceback.print_exception(cause)
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
