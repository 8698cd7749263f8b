"""The commands for a site: what may run on its data, and what has left."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

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

    from corymb.client.gate.ledger import Ledger, in_words

    ledger = Ledger(folder / "ledger.jsonl")
    for entry in ledger.entries():
        print(json.dumps(entry) if as_json else in_words(entry))
    if not as_json:
        print(f"The ledger is whole. Its last line has the SHA-256 {ledger.head()}.")


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
    from re import fullmatch

    from corymb.client.gate.ledger import Ledger
    from corymb.client.gate.policy import SitePolicy
    from corymb.client.gate.policy import approve as add

    known = {approval.app for approval in SitePolicy.read(folder / "policy.toml").approved}
    refused = [entry["app"] for entry in Ledger(folder / "ledger.jsonl").entries() if entry["event"] == "refused"]
    waiting = [each for each in refused if each not in known]
    if not app and not waiting:
        raise ValueError(f"No app was refused in {folder} that is not in the policy already; name one with --app.")
    if app and not fullmatch("[0-9a-f]{64}", app):
        raise ValueError(f"--app {app} is no SHA-256 of 64 hexadecimal digits, such as `corymb hash APP` prints.")
    add(folder / "policy.toml", app or waiting[-1], purpose, until.date())
    console.print(f"Approved the app {app or waiting[-1]} until {until.date()}.", soft_wrap=True)


def site_page(
    folder: Annotated[Path, typer.Argument(metavar="KIT", help="The kit of a site, or the folder of its gate.")],
    port: Annotated[int, typer.Option(help="The port on this machine.")] = 8451,
) -> None:
    """Show a site's own page: what ran on its data, what left, approvals, limits and whether it has paused.

    \b
    corymb site north

    It answers on this machine only, and changes nothing.
    """
    from corymb.pages.app import serve
    from corymb.pages.site import make_site_app

    app = make_site_app(folder.resolve())
    console.print(f"http://127.0.0.1:{port}/   (Ctrl-C ends it)")
    serve(app, port)
