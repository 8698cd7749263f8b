"""What the round loop needs of a journal, and what it does while the journal cannot be written."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from flwr.app import ConfigRecord, Message

from corymb.protocol.records import RESUMABLE
from corymb.server.rounds.events import Event
from corymb.server.rounds.record import RoundRecord
from corymb.server.rounds.round import Asked
from corymb.server.rounds.state import RunState

log = logging.getLogger("flwr.corymb")
PATIENCE, PAUSE = 300.0, 5.0  # seconds, at the end of a run
UNWRITABLE = (OSError, sqlite3.OperationalError)  # a full or read-only disk, a locked database


class AskJournal(Protocol):
    """The methods of a journal that keeps what was asked and answered in the round under way.

    None of them raises: while the disk is full, an error is logged, and a restarted server asks again.
    """

    def first_run(self, run_id: int) -> int:
        """Return the id of the Flower run in which the run of this journal began; `run_id` if it begins now."""

    def asked(self, number: int, phase: str, run_id: int) -> Asked | None:
        """Return what was asked in this phase, if it was in the Flower run `run_id`."""

    def note_asked(self, number: int, phase: str, asked: Asked) -> None:
        """Note what is asked in a phase. It is on the disk when this method returns."""

    def keep_reply(self, number: int, phase: str, reply: Message, at: float) -> None:
        """Keep a reply, which has arrived at the Unix time `at`, until its round is committed."""

    def kept_replies(self, number: int, phase: str) -> Iterator[tuple[Message, float]]:
        """Yield the replies that were kept in this phase, in the order of arrival, with their Unix times."""

    def note_event(self, event: Event) -> None:
        """Store an event."""


class RoundJournal(Protocol):
    """The methods of `Journal` that the round loop uses."""

    folder: Path
    """The folder of the journal, in which the orders of operators are looked for."""

    @property
    def asks(self) -> AskJournal | None:
        """The part that keeps what is asked and answered; None if the journal keeps rounds only."""

    @property
    def resumable(self) -> tuple[int, ...]:
        """The rounds of the states that are kept: the run can be resumed after each of them."""

    def begin(self, about: Mapping[str, str], resume: bool) -> None:
        """Prepare the journal for the run that `about` describes; with `resume`, it may hold rounds of this run."""

    def note(self, entries: Mapping[str, str]) -> None:
        """Store facts about the run that pages show, such as how many rounds are planned."""

    def resume(self, initial: RunState) -> RunState:
        """Return the newest whole state, or `initial` if there is none, and delete the rounds after it."""

    def rounds(self) -> Iterator[RoundRecord]:
        """Return the records of all rounds, in order."""

    def write(self, record: RoundRecord, state: RunState) -> None:
        """Write a finished round and the state after it. If that fails, keep them in memory and raise."""

    def finish(self) -> None:
        """Commit the rounds that have been written, and note that the run is complete."""


def with_resumable(config: ConfigRecord, journal: RoundJournal | None) -> ConfigRecord:
    """Return `config` with the rounds after which the run may be resumed, so that clients keep what they need then."""
    return config if journal is None else ConfigRecord({**config, RESUMABLE: list(journal.resumable)})


def write_or_keep(journal: RoundJournal, record: RoundRecord, state: RunState) -> None:
    """Write a finished round. While the disk is full or locked, the run goes on and the journal keeps the round."""
    try:
        journal.write(record, state)
    except UNWRITABLE as error:
        log.error("The journal cannot be written (%s); this round is kept in memory and written later.", error)


def finish_patiently(journal: RoundJournal) -> None:
    """Commit the last rounds of a run; try again for `PATIENCE` seconds before raising the error."""
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            return journal.finish()
        except UNWRITABLE as error:
            if time.monotonic() > ends:
                raise
            log.error("The journal cannot be written (%s); trying again in %g s.", error, PAUSE)
            time.sleep(PAUSE)
