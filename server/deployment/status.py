"""The sites of a federation as its server sees them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from corymb.protocol.certificates import days_left, read_certificate
from corymb.protocol.signed_grid import SOFTWARE
from corymb.server.deployment.provision import ROSTER

SITES = "sites.json"  # in var: what the monitor sees


def status(folder: Path) -> dict[str, Any]:
    """Return the state of the server whose kit lies in `folder`, and of each site, as JSON.

    Raises `ValueError` if the server has not looked since its start.
    """
    path = folder / "var" / SITES
    if not path.exists():
        raise ValueError(f"The server of {folder} does not run, or has just been started; see `corymb serve --help`.")
    seen = json.loads(path.read_text())
    software = software_of_sites(folder)
    last = _last_replies(folder / "var" / "corymb" / "runs")
    sites = {}
    for certificate in sorted((folder / ROSTER).glob("*.crt")):
        name = certificate.stem
        state = seen["sites"].get(name, {"online": False, "since": "", "node": ""})
        left = round(days_left(read_certificate(certificate)), 1)
        runs = {"software": software[name]} if name in software else {}
        sites[name] = {**state, "certificate_days": left, **runs, **last.get(name, {})}
    server = {"certificate_days": round(days_left(read_certificate(folder / "server.crt")), 1), "seen_at": seen["at"]}
    return {"server": server, "sites": sites}


def active_runs(folder: Path) -> list[str]:
    """Return the ids of the runs that were under way when the monitor looked last."""
    try:
        runs: dict[str, str] = json.loads((folder / "var" / SITES).read_text())["runs"]
    except (OSError, ValueError, KeyError):
        return []
    return [run_id for run_id, state in runs.items() if not state.startswith("finished")]


def software_of_sites(folder: Path) -> dict[str, str]:
    """Return the versions of Corymb and Flower at each site that has said so in a signed reply."""
    return {path.name: path.read_text() for path in (folder / "var" / SOFTWARE).glob("*")}


def _last_replies(runs: Path) -> dict[str, dict[str, Any]]:
    """Return the last verdict on each site, in the newest journal that has one."""
    last: dict[str, dict[str, Any]] = {}
    for run in sorted(runs.glob("*/journal.sqlite"), key=lambda path: path.stat().st_mtime):
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{run}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT node, MAX(round), code, reason FROM verdicts GROUP BY node").fetchall()
            for node, number, code, reason in rows:
                last[node] = {"run": run.parent.name, "round": number, "verdict": code, "reason": reason}
    return last
