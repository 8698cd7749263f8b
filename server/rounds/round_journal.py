"""What the round loop needs of a journal, and what it does while the journal cannot be written."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from corymb.server.rounds.record import RoundRecord
from corymb.server.rounds.state import RunState

log = logging.getLogger("flwr.corymb")
PATIENCE, PAUSE = 300.0, 5.0  # seconds, at the end of a run
UNWRITABLE = (OSError, sqlite3.OperationalError)  # a full or read-only disk, a locked database


class RoundJournal(Protocol):
    """The methods of `Journal` that the round loop uses."""

    def begin(self, about: Mapping[str, str], resume: bool) -> None:
        """Prepare the journal for the run that `about` describes; with `resume`, it may hold rounds of this run."""

    def resume(self, initial: RunState) -> RunState:
        """Return the newest whole state, or `initial` if there is none, and delete the rounds after it."""

    def rounds(self) -> Iterator[RoundRecord]:
        """Return the records of all rounds, in order."""

    def write(self, record: RoundRecord, state: RunState) -> None:
        """Write a finished round and the state after it. If that fails, keep them in memory and raise."""

    def commit(self) -> None:
        """Commit the rounds that have been written."""


def write_or_keep(journal: RoundJournal, record: RoundRecord, state: RunState) -> None:
    """Write a finished round. While the disk is full or locked, the run goes on and the journal keeps the round."""
    try:
        journal.write(record, state)
    except UNWRITABLE as error:
        log.error("The journal cannot be written (%s); this round is kept in memory and written later.", error)


def commit_patiently(journal: RoundJournal) -> None:
    """Commit the last rounds of a run; try again for `PATIENCE` seconds before raising the error."""
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            return journal.commit()
        except UNWRITABLE as error:
            if time.monotonic() > ends:
                raise
            log.error("The journal cannot be written (%s); trying again in %g s.", error, PAUSE)
            time.sleep(PAUSE)
