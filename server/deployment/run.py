"""A run in a federation, from the server: it starts an app, follows the journal, and ends with a true status."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from corymb.protocol.flower_control import ControlError, SuperLink
from corymb.server.deployment.federation import ServerKit
from corymb.server.rounds.orders import read_orders
from corymb.server.rounds.run_failed import FAILED

COMPLETED = "finished:completed"
POLL_SECONDS = 1.0
REMIND_SECONDS = 15.0  # between two lines that name the sites that a round waits for
SHOWN_METRICS, HIDDEN_METRICS = 3, ("seconds", "steps")


def superlink_of(folder: Path, kit: ServerKit) -> SuperLink:
    """Return the control API of the server whose kit lies in `folder`."""
    return SuperLink(f"127.0.0.1:{kit.superlink_port}", (folder / "ca.crt").read_bytes())


def write_app(folder: Path, name: str, serverapp: str, clientapp: str, config: dict[str, str]) -> None:
    """Write into `folder` the Flower app `name` of two parts of Corymb, each as "module:name", with its run config."""
    app = {"publisher": "corymb", "components": {"serverapp": serverapp, "clientapp": clientapp}, "config": config}
    project = {"name": name, "version": "1.0.0", "requires-python": ">=3.11", "dependencies": []}
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))


def start(app: Path, folder: Path, kit: ServerKit, config: list[str]) -> int:
    """Start the Flower app in the folder `app` and return the run's id. `config` are entries KEY=VALUE of its config.

    Raises `ValueError` with what Flower says, if it does not start the run.
    """
    command = [str(Path(sys.executable).parent / "flwr"), "run", str(app), kit.federation, "--format", "json"]
    command += ["--run-config", " ".join(config)] if config else []
    environment = os.environ | {
        "FLWR_HOME": str(folder / "var" / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"error-message": done.stderr or done.stdout}
    if "run-id" not in answer:
        lines = [line.strip() for line in str(answer.get("error-message", "")).splitlines() if line.strip()]
        raise ValueError(f"Flower does not start {app}: {lines[-1][-500:] if lines else 'it says nothing'}")
    return int(answer["run-id"])


@dataclass
class Progress:
    """What the journal in `folder` has said so far, as lines of text."""

    folder: Path
    rounds: int = 0
    events: int = 0
    reminded: float = field(default_factory=time.monotonic)

    def lines(self) -> Iterator[str]:
        """Yield a line for each round that is new, for each reply that was not admitted, and for whom it waits."""
        path = self.folder / "journal.sqlite"
        if not path.exists():
            return
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for number, seconds, train, evaluate in database.execute(
                "SELECT round, seconds, train, evaluate FROM rounds WHERE round > ? ORDER BY round", (self.rounds,)
            ).fetchall():
                yield from self._round(database, number, seconds, {**json.loads(train), **json.loads(evaluate)})
                self.rounds, self.reminded = number, time.monotonic()
            if time.monotonic() - self.reminded > REMIND_SECONDS:
                self.reminded = time.monotonic()
                if not self.rounds and not database.execute("SELECT 1 FROM asks LIMIT 1").fetchone():
                    needed = database.execute("SELECT value FROM run WHERE key = 'sites-to-begin'").fetchone()
                    yield f"the run begins when {needed[0] if needed else 'enough'} sites are online; see corymb status"
                yield from self._waiting(database)

    def _round(
        self, database: sqlite3.Connection, number: int, seconds: float, metrics: dict[str, Any]
    ) -> Iterator[str]:
        verdicts = database.execute("SELECT code, reason FROM verdicts WHERE round = ?", (number,)).fetchall()
        counted = sum(code == "admitted" for code, _ in verdicts)
        shown_metrics = {name: value for name, value in metrics.items() if name not in HIDDEN_METRICS}
        numbers = [f"{name} {value:.4g}" for name, value in shown_metrics.items() if isinstance(value, float)]
        shown = ", ".join(["", *numbers[:SHOWN_METRICS]])
        yield f"round {number}: {counted} of {len(verdicts)} sites counted, {seconds:.1f} s{shown}"
        for code, reason in verdicts:
            if code != "admitted":
                yield f"  {reason}"

    def _waiting(self, database: sqlite3.Connection) -> Iterator[str]:
        rows = database.execute(
            "SELECT node, round, MIN(at), SUM(what IN ('replied', 'failed')) FROM events WHERE (round, phase) IN "
            "(SELECT round, phase FROM asks ORDER BY at DESC LIMIT 1) GROUP BY node, round"
        ).fetchall()
        waits = [(node, number, time.time() - at) for node, number, at, answers in rows if not answers]
        late = [each for each in waits if each[2] > REMIND_SECONDS]
        if late:
            names = ", ".join(f"{node} ({seconds:.0f} s)" for node, _, seconds in late[:5])
            more = f" and {len(late) - 5} more" if len(late) > 5 else ""
            yield f"round {late[0][1]} waits for {names}{more}"


def journal_of(folder: Path, run_id: int) -> Path | None:
    """Return the folder of a run's journal, which has the id of an earlier run if it goes on from there."""
    for path in (folder / "var" / "corymb" / "runs").glob("*/journal.sqlite"):
        with suppress(sqlite3.Error):
            if _value(path.parent, "SELECT value FROM run WHERE key = 'flower-run'") == str(run_id):
                return path.parent
    return None


def last_words(journal: Path, status: str) -> Iterator[str]:
    """Yield what is to be said of a run that has ended with this status, and what one may do now."""
    if by := read_orders(journal).stopped_by:
        yield f"{by} has stopped it with `corymb order`; with --set resume=true, a new run goes on."
    if status == COMPLETED:
        yield f"To write its model to a file: corymb model export {journal}"
        return
    reason = (
        _value(journal, f"SELECT value FROM run WHERE key = '{FAILED}'") or "Its ServerApp has ended without a word."
    )
    yield f"{reason} With --set resume=true, a new run goes on after the last round."


def _value(journal: Path, query: str) -> Any:
    with closing(sqlite3.connect(f"file:{journal / 'journal.sqlite'}?mode=ro", uri=True)) as database:
        return (database.execute(query).fetchone() or (None,))[0]


def follow(folder: Path, kit: ServerKit, run_id: int, say: Callable[[str], None]) -> str:
    """Say what happens in a run until it ends. Returns its status, as Flower puts it."""
    superlink, progress = superlink_of(folder, kit), None
    away_since = None
    while True:
        status = ""
        try:
            status = superlink.run_statuses().get(run_id, "")
            away_since = None
        except ControlError:  # the SuperLink is restarted, or the server has been stopped
            if away_since is None:
                away_since = time.monotonic()
            elif time.monotonic() - away_since > REMIND_SECONDS:
                away_since = time.monotonic()
                say("the server does not answer; does `corymb serve` run?")
        if progress is None and (journal := journal_of(folder, run_id)) is not None:
            progress = Progress(journal)
            if journal.name != f"run-{run_id}":
                progress.rounds = _value(journal, "SELECT COALESCE(MAX(round), 0) FROM rounds")
                say(f"goes on after round {progress.rounds} of {journal.name}")
        for line in progress.lines() if progress is not None else ():
            say(line)
        if status.startswith("finished"):
            return status
        time.sleep(POLL_SECONDS)
