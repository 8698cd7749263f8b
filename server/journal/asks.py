"""What was asked and answered in the round under way, kept until it is committed; and the events of all rounds."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Message

from corymb.protocol.message_file import read_message, write_message
from corymb.server.rounds.events import Event
from corymb.server.rounds.round import Asked, Requests

log = logging.getLogger("flwr.corymb")
UNWRITABLE = (OSError, sqlite3.OperationalError)
FOLDER = "replies"


class Asks:
    """The table `asks`, the table `events`, and one file per reply, in the journal's `folder`; see `AskJournal`."""

    def __init__(self, folder: Path, database: sqlite3.Connection) -> None:
        self._folder, self._database = folder / FOLDER, database
        self._is_writable = True  # as far as is known: an error is logged once
        self._next: dict[str, int] = {}  # the number of the next reply in each phase

    def first_run(self, run_id: int) -> int:
        """See `AskJournal.first_run`."""
        self._write("INSERT OR IGNORE INTO run VALUES ('first-run', ?)", (str(run_id),))
        row = self._database.execute("SELECT value FROM run WHERE key = 'first-run'").fetchone()
        return run_id if row is None else int(row[0])

    def asked(self, number: int, phase: str, run_id: int) -> Asked | None:
        """See `AskJournal.asked`."""
        row = self._database.execute(
            "SELECT nonce, at, requests FROM asks WHERE round = ? AND phase = ? AND run_id = ?",
            (number, phase, str(run_id)),
        ).fetchone()
        if row is None:
            return None
        nonce, at, requests = row
        fields = json.loads(requests)
        if "base" in fields and (not fields["base"] or fields["base"] != self._base(number)):
            return None  # what was asked began from another result of the round before
        connected = {int(node_id): name for node_id, name in fields["connected"].items()}
        return Asked(
            nonce,
            Requests(fields["by_message"], tuple(fields["nodes"]), connected, fields.get("down", {})),
            at,
            run_id,
            fields.get("remembers", {}),
        )

    def note_asked(self, number: int, phase: str, asked: Asked) -> None:
        """See `AskJournal.note_asked`."""
        requests = asked.requests
        fields = {
            "by_message": requests.by_message,
            "nodes": requests.nodes,
            "connected": requests.connected,
            "down": requests.bytes_down,
            "remembers": dict(asked.remembers),
            "base": self._base(number),
        }
        row = (number, phase, str(asked.run_id), asked.nonce, asked.at, json.dumps(fields))
        self._write("INSERT OR REPLACE INTO asks VALUES (?, ?, ?, ?, ?, ?)", row)

    def _base(self, number: int) -> str:
        """Return what round `number` begins from: the SHA-256 of the committed model; "" if it is not committed."""
        if number == 1:
            return "start"
        query = "SELECT model_sha256 FROM rounds WHERE round = ?"
        try:
            row = self._database.execute(query, (number - 1,)).fetchone()
        except sqlite3.Error:
            return ""
        return str(row[0] or "") if row else ""

    def keep_reply(self, number: int, phase: str, reply: Message, at: float) -> None:
        """See `AskJournal.keep_reply`."""
        try:
            self._folder.mkdir(exist_ok=True)
            prefix = _prefix(number, phase)
            if prefix not in self._next:
                self._next = {prefix: len(list(self._folder.glob(f"{prefix}*.reply")))}
            path = self._folder / f"{prefix}{self._next[prefix]:06d}.reply"
            write_message(path, reply)
            os.utime(path, (at, at))
            self._next[prefix] += 1
        except (*UNWRITABLE, ValueError, TypeError) as error:  # the latter two: what Flower cannot encode
            self._complain(error)

    def kept_replies(self, number: int, phase: str) -> Iterator[tuple[Message, float]]:
        """See `AskJournal.kept_replies`. A damaged file is left out."""
        for path in sorted(self._folder.glob(f"{_prefix(number, phase)}*.reply")):
            reply = read_message(path)
            if reply is None:
                log.warning("The kept reply %s is damaged; its node is asked again.", path)
            else:
                yield reply, path.stat().st_mtime

    def note_event(self, event: Event) -> None:
        """See `AskJournal.note_event`."""
        row = (event.at, event.round, event.phase, event.node, event.what, event.seconds, event.size, event.detail)
        self._write("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def forget(self, number: int, after: bool = False) -> None:
        """Forget what was asked and answered up to round `number`; with `after`, that of the rounds after it."""
        self._write(f"DELETE FROM asks WHERE round {'>' if after else '<='} ?", (number,))
        for path in self._folder.glob("*.reply"):
            if (int(path.name.split("-")[0]) > number) == after:
                path.unlink(missing_ok=True)

    def _write(self, statement: str, row: tuple[object, ...]) -> None:
        try:
            self._execute(statement, row)
            self._is_writable = True
        except UNWRITABLE as error:
            self._complain(error)

    def _execute(self, statement: str, row: tuple[object, ...]) -> None:
        with self._database:
            self._database.execute(statement, row)

    def _complain(self, error: Exception) -> None:
        if self._is_writable:
            log.error("The journal cannot keep what is asked and answered (%s); the run goes on.", error)
        self._is_writable = False


def _prefix(number: int, phase: str) -> str:
    return f"{number:06d}-{phase}-"
