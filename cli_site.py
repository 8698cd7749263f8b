"""The commands for a site: what may run on its data, and what has left."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()


def gate(
    folder: Annotated[Path, typer.Argument(help="A folder, to be put first on the PATH of flower-supernode.")],
) -> None:
    """Write a site's gate: a program that stands around every ClientApp, and the site's policy.

    \b
    corymb gate gate
    PATH="$PWD/gate:$PATH" flower-supernode ...

    `corymb join` does this by itself. Flower starts the program,
    flwr-clientapp, in place of its own. FOLDER/policy.toml says what may
    run and what may leave; FOLDER/ledger.jsonl records both.
    """
    from corymb.client.gate.policy import template
    from corymb.client.gate.program import write_site

    path = write_site(folder.resolve(), template(signed_tasks=False))
    policy, start = path.parent / "policy.toml", f"PATH={path.parent}:$PATH flower-supernode ..."
    console.print(f"Wrote {path}. Edit {policy}, and start the SuperNode with\n  {start}", soft_wrap=True)


def audit(
    folder: Annotated[Path, typer.Argument(metavar="KIT", help="The kit of a site, or the folder of its gate.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print each entry as a line of JSON.")] = False,
) -> None:
    """Check a site's ledger and print it: what ran on the site's data, what was refused, and what left.

    \b
    corymb audit north

    Exit code 2: a line of the ledger was changed or is missing.
    """
    import json

    from corymb.client.gate.ledger import Ledger

    ledger = Ledger(folder / "ledger.jsonl")
    for entry in ledger.entries():
        print(json.dumps(entry) if as_json else _in_words(entry))
    if not as_json:
        print(f"The ledger is whole. Its last line has the SHA-256 {ledger.head()}.")


def _in_words(entry: dict[str, Any]) -> str:
    """Return an entry of a ledger as a line."""
    task = f"round {entry['round']} of run {entry['run']}" if "run" in entry else f"app {entry['app'][:12]}"
    purpose = f", {entry['purpose']}" if "purpose" in entry else ""
    what = entry.get("reason") or entry.get("error") or ""
    if "bytes" in entry:
        metrics = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in entry["metrics"].items()
        )
        withheld = f"; withheld: {', '.join(entry['withheld'])}" if entry["withheld"] else ""
        what = f"{entry['arrays']} arrays, {entry['bytes']} bytes; {metrics}{withheld}"
    detail = f": {what}" if what else ""
    line = f"{entry['at']} {entry['event']:8} {entry.get('kind', ''):8} {task}{purpose}{detail}"
    return "".join(c if c.isprintable() else "?" for c in line)  # some of it comes from apps


def approve(
    folder: Annotated[Path, typer.Argument(metavar="KIT", help="The kit of a site, or the folder of its gate.")],
    purpose: Annotated[str, typer.Option(help="The study, in words, for the ledger.")],
    until: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="The day on which the approval expires.")],
    app: Annotated[
        str,
        typer.Option(help="The SHA-256 of the app (default: the last refused one without an entry)."),
    ] = "",
) -> None:
    """Approve an app at a site, for a purpose and until a day.

    \b
    corymb approve north --purpose "Study 17" --until 2027-06-30

    The approval goes into policy.toml, where it can be changed or taken
    out.
    """
    from corymb.client.gate.ledger import Ledger
    from corymb.client.gate.policy import SitePolicy
    from corymb.client.gate.policy import approve as add

    known = {approval.app for approval in SitePolicy.read(folder / "policy.toml").approved}
    refused = [entry["app"] for entry in Ledger(folder / "ledger.jsonl").entries() if entry["event"] == "refused"]
    waiting = [each for each in refused if each not in known]
    if not app and not waiting:
        raise ValueError(f"No app was refused in {folder} that is not in the policy already; name one with --app.")
    add(folder / "policy.toml", app or waiting[-1], purpose, until.date())
    console.print(f"Approved the app {app or waiting[-1]} until {until.date()}.", soft_wrap=True)
