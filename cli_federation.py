"""The commands for a federation that runs: runs of apps, its state, its faults, and backups."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

if TYPE_CHECKING:
    from corymb.server.deployment.federation import ServerKit

console = Console(soft_wrap=True, markup=False, highlight=False)
Folder = Annotated[Path, typer.Argument(metavar="KIT", help="The folder of a kit that `corymb provision` has made.")]


def run(
    app: Annotated[
        Path, typer.Argument(metavar="APP", help="The folder of a Flower app, or an experiment's TOML file.")
    ],
    federation: Annotated[Path, typer.Option(metavar="KIT", help="The kit of the server, on this machine.")],
    changes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Change the run config or the experiment. Can be repeated."),
    ] = None,
) -> None:
    """Run a Flower app or an experiment in a federation, and say what happens until it ends.

    \b
    corymb run examples/quickstart --federation hearts/server --set rounds=10
    corymb run exp.toml --federation hearts/server

    Of an experiment, each rule and seed is a run; each site trains on the
    data that its policy names. Exit code 1: a run has failed. The journal
    and the model stay on the server; see `corymb model`.
    """
    from corymb.server.deployment.federation import ServerKit, read_kit

    folder = federation.resolve()
    kit = read_kit(folder)
    if not isinstance(kit, ServerKit):
        raise ValueError(f"{folder} is the kit of a site; a run starts on the machine of the server, with its kit.")
    if app.is_dir():
        completed = _run_one(app, folder, kit, [_quoted(change) for change in changes or []])
    else:
        completed = _run_experiment(app, folder, kit, changes or [])
    raise typer.Exit(0 if completed else 1)


def _run_experiment(file: Path, folder: Path, kit: ServerKit, changes: list[str]) -> bool:
    import json
    import tempfile

    from corymb.server.deployment.provision import ROSTER
    from corymb.simulations.experiments.federated import KEY, runs_of, unused, write_app
    from corymb.simulations.experiments.reader import parse_change, read

    experiment = read(file, dict(parse_change(change) for change in changes))
    sites = len(list((folder / ROSTER).glob("*.crt")))
    if left_out := unused(experiment):
        console.print(f"A federation does not use these settings of {file}: {', '.join(left_out)}.")
    completed = True
    with tempfile.TemporaryDirectory() as scratch:
        write_app(Path(scratch))
        for title, settings in runs_of(experiment, sites):
            console.print(title)
            completed &= _run_one(Path(scratch), folder, kit, [f"{KEY}={json.dumps(settings)}"])
    return completed


def _run_one(app: Path, folder: Path, kit: ServerKit, config: list[str]) -> bool:
    """Run an app. Returns whether it was completed."""
    from corymb.server.deployment.run import COMPLETED, follow, journal_of, last_words, start

    run_id = start(app, folder, kit, config)
    console.print(f"Run {run_id}")
    status = follow(folder, kit, run_id, console.print)
    console.print(f"Run {run_id} is {status}.")
    journal = journal_of(folder, run_id)
    for line in last_words(journal, status) if journal is not None else ():
        console.print(line, markup=False, soft_wrap=True)
    return status == COMPLETED


def _quoted(change: str) -> str:
    """Return KEY=VALUE in Flower's syntax, in which a string has quotes."""
    import json

    key, sign, value = change.partition("=")
    if not sign:
        raise ValueError(f"--set {change} is not KEY=VALUE.")
    try:
        json.loads(value)
        return change
    except ValueError:
        return f"{key}={json.dumps(value)}"


def status(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the sites of a federation, on the machine of its server: who is online, and how its last round went.

    \b
    corymb status hearts/server
    """
    import json

    from rich.table import Table

    from corymb.pages.numbers import Federation
    from corymb.server.deployment.status import status as state_of

    state, orders = state_of(folder.resolve()), Federation(folder.resolve()).orders()
    for name, site in state["sites"].items():
        site["excluded"] = name in orders.excluded
    state["server"] |= {"paused_by": orders.paused_by, "stopped_by": orders.stopped_by}
    if as_json:
        print(json.dumps(state))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "state", "since", "last round", "certificate"):
        table.add_column(column, overflow="fold")
    for name, site in state["sites"].items():
        last = f"{site['round']}: {site['verdict']}" if "round" in site else "-"
        since = site["since"][:19].replace("T", " ") or "-"
        word = ("online" if site["online"] else "offline") + ", excluded" * site["excluded"]
        table.add_row(name, word, since, last, f"{site['certificate_days']:.0f} days")
    Console().print(table)
    server = state["server"]
    if server["stopped_by"]:
        console.print(f"{server['stopped_by']} has stopped the run; it ends with the present round.", markup=False)
    elif server["paused_by"]:
        console.print(f"{server['paused_by']} has paused the run before its next round.", markup=False)
    console.print(f"As of {server['seen_at']}. The server's certificate: {server['certificate_days']:.0f} days.")


def doctor(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a server or a site and its surroundings, and say in one sentence what is wrong.

    \b
    corymb doctor north
    corymb doctor hearts/server

    The exit code is that of the first fault; docs/operate.md lists
    them.
    """
    import json
    from itertools import chain

    from corymb.client.gate.doctor import gate_findings
    from corymb.protocol.findings import Fault, Finding
    from corymb.server.deployment.doctor import server_findings, site_findings
    from corymb.server.deployment.federation import SiteKit, read_kit

    folder = folder.resolve()
    kit = read_kit(folder)
    found: Iterable[Finding]
    if isinstance(kit, SiteKit):
        found = chain(site_findings(folder, kit), gate_findings(folder))
    else:
        found = server_findings(folder, kit)
    findings = []
    for finding in found:
        findings.append(finding)
        if not as_json:  # at once, because an empty round takes half a minute
            console.print(f"{'ok   ' if finding.fault is Fault.NONE else 'FAULT'} {finding.text}")
    if as_json:
        print(json.dumps([{"code": int(each.fault), "text": each.text} for each in findings]))
    faults = [finding for finding in findings if finding.fault is not Fault.NONE]
    raise typer.Exit(int(faults[0].fault) if faults else 0)


def backup(
    folder: Folder,
    archive: Annotated[Path, typer.Argument(help="The file to write, a .tar.gz.")],
) -> None:
    """Write the kit of a server, the SuperLink's database and all journals to one file. The server may be running.

    \b
    corymb backup hearts/server hearts-2026-12-01.tar.gz

    The file holds private keys; keep it like them.
    """
    from corymb.server.deployment.backup import backup as write

    write(folder.resolve(), archive)
    console.print(f"Wrote {archive}, {archive.stat().st_size / 1e6:.1f} MB. It holds private keys.")


def restore(
    archive: Annotated[Path, typer.Argument(help="A file that `corymb backup` has written.")],
    folder: Annotated[Path, typer.Argument(metavar="KIT", help="The folder to make.")],
) -> None:
    """Unpack a backup of a server into a new folder.

    \b
    corymb restore hearts-2026-12-01.tar.gz hearts/server

    The SuperLink's database works with the version of Flower that wrote it,
    and with newer ones.
    """
    from importlib.metadata import version

    from corymb.server.deployment.backup import restore as unpack

    flower = unpack(archive, folder)
    console.print(f"Restored {folder}, made with Flower {flower}; here is Flower {version('flwr')}.")


def order(
    folder: Folder,
    action: Annotated[str, typer.Argument(help="pause, resume, stop, exclude or include.")],
    site: Annotated[str, typer.Argument(help="The site, for exclude and include.")] = "",
) -> None:
    """Pause or stop the newest run of a federation, or exclude a site from its rounds.

    \b
    corymb order hearts/server pause
    corymb order hearts/server exclude north

    It takes effect before the next round; stop ends the run after the
    present one. Who ordered what, and when, is kept in orders.jsonl in
    the run's journal.
    """
    from getpass import getuser
    from os import environ

    from corymb.pages.numbers import Federation
    from corymb.server.deployment.provision import ROSTER
    from corymb.server.rounds.orders import add_order

    federation = Federation(folder.resolve())
    journal = federation.journal()
    runs = federation.seen()["runs"]
    state = "" if journal is None else runs.get(journal.about().get("flower-run", ""), "finished")
    if journal is None or state.startswith("finished"):
        raise ValueError(f"No run of {federation.kit.federation} is under way with a journal.")
    names = sorted(path.stem for path in (federation.folder / ROSTER).glob("*.crt"))
    if site and site not in names:
        raise ValueError(f"There is no site {site!r}; the roster has {', '.join(names)}.")
    add_order(journal.folder, action, environ.get("SUDO_USER") or getuser(), site)
    console.print(f"Ordered: {action} {site}".rstrip() + f", for {journal.folder.name}.", markup=False, soft_wrap=True)
