"""The commands for apps, models, and the supervisor of a ServerApp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

console = Console()


def supervisor(
    folder: Annotated[Path, typer.Argument(help="A folder, to be put first on the PATH of flower-superlink.")],
) -> None:
    """Write a program that restarts a crashed ServerApp under the same run.

    \b
    corymb supervisor programs
    PATH="$PWD/programs:$PATH" flower-superlink ...

    `corymb serve` does this by itself. The program is called
    flwr-serverapp, and Flower starts it in place of its own. The ServerApp
    must keep a journal.
    """
    from corymb.server.supervisor_program import write_program

    path = write_program(folder.resolve())
    start = f"PATH={path.parent}:$PATH flower-superlink ..."
    console.print(f"Wrote {path}. Start the SuperLink with\n  {start}", soft_wrap=True)


model = typer.Typer(help="The trained models of runs on a SuperLink.", no_args_is_help=True)


@model.command("list")
def list_models(
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the journals (default: ~/.corymb/runs)."),
    ] = None,
) -> None:
    """List the runs that have a journal, oldest first, with their best round."""
    from corymb.server.journal.models import stored_runs
    from corymb.server.settings import runs_folder

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "rule", "rounds", "best round", "accuracy or -loss"):
        table.add_column(column, overflow="fold", no_wrap=column == "run")  # an id is there to be copied
    for run in stored_runs(folder or runs_folder()):
        score = "-" if run.best_score is None else f"{run.best_score:.4f}"
        table.add_row(run.folder.name, run.rule, str(run.rounds), str(run.best_round or "-"), score)
    console.print(table)


@model.command("export")
def export(
    run: Annotated[str, typer.Argument(help="A run in ~/.corymb/runs, or the folder of a journal.")],
    best: Annotated[bool, typer.Option("--best", help="Export the best model instead of the last.")] = False,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.safetensors"),
) -> None:
    """Write a run's model to a safetensors file, whose metadata say where it comes from.

    \b
    corymb model export run-15040251964519665733 --best --out hearts.safetensors

    RUN is the name of a run in ~/.corymb/runs, or the folder of a journal.
    """
    from corymb.server.journal.models import export_model
    from corymb.server.settings import runs_folder

    folder = Path(run) if Path(run).is_dir() else runs_folder() / run
    metadata = export_model(folder, out, best)
    console.print(f"Wrote the model of round {metadata['round']} to {out}.", markup=False, soft_wrap=True)


def app_hash(
    app: Annotated[
        Path,
        typer.Argument(
            metavar="APP", help='The folder of a Flower app; "experiments" for that of `corymb run EXPERIMENT`.'
        ),
    ],
) -> None:
    """Print the SHA-256 of an app, by which sites approve it.

    \b
    corymb hash examples/quickstart
    corymb hash experiments

    The second is the app of `corymb run EXPERIMENT`, the same for all
    experiments. The hash is that of the bundle that Flower makes of the
    app; the same files give the same hash on every machine.
    """
    from corymb.protocol.flower_tasks import build_bundle

    if str(app) != "experiments":
        print(f"{build_bundle(app).names[-1]}  {app}")
        return
    import tempfile

    from corymb.simulations.experiments.federated import write_app

    with tempfile.TemporaryDirectory() as scratch:
        write_app(Path(scratch))
        print(f"{build_bundle(Path(scratch)).names[-1]}  experiments")


def dashboard(
    folder: Annotated[Path, typer.Argument(metavar="RUNS", help="A server's kit, or any folder with journals.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(help="The port on this machine.")] = 8450,
) -> None:
    """Show runs in a browser: the sites of a federation, and every run whose journal lies in RUNS.

    It answers on this machine only, and changes nothing. `corymb serve` has
    the same page at the port `pages_port` of its kit.

    Example: corymb dashboard runs
    """
    from corymb.pages.app import make_app, serve
    from corymb.pages.numbers import Federation, Runs
    from corymb.server.deployment.federation import KIT

    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give one with journals, such as runs.")
    source = Federation(folder) if (folder / KIT).exists() else Runs(folder)
    console.print(f"http://127.0.0.1:{port}/   (Ctrl-C ends it)")
    serve(make_app(source), port)


def alerts(
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Print a dashboard to import in Grafana instead.")
    ] = False,
) -> None:
    """Print the alarms as rules for Prometheus.

    Example: corymb alerts > alerts.yml
    """
    from importlib.resources import files

    from corymb.pages.metrics import alert_rules

    drawn = files("corymb.pages") / "monitoring" / "dashboard.json"
    typer.echo(drawn.read_text() if dashboard else alert_rules(), nl=False)
