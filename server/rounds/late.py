"""Nodes that owe a reply to an earlier round: they are busy, and asking them again would only make them queue."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.serverapp import Grid

from corymb.server.rounds.events import Event, EventLog
from corymb.server.rounds.pulls import pulled

POLL_SECONDS = 2.0  # for late replies, at the start of a round
MOST_ROUNDS = 8  # that a node is left alone


@dataclass(frozen=True)
class Late:
    """The messages that a node has not answered, their round and phase, and the round in which it is asked anyway."""

    message_ids: tuple[str, ...]
    round: int
    phase: str
    until: int


class LateReplies:
    """The replies that came after their round had ended. They are received, and never counted.

    A node that owes a reply is busy for one round, then for two, four and at most eight: its reply may be lost.
    """

    def __init__(self, grid: Grid, events: EventLog) -> None:
        self._grid, self._events = grid, events
        self._late: dict[str, Late] = {}
        self._pause: dict[str, int] = {}  # rounds for which a node is left alone

    def add(self, number: int, phase: str, unanswered: Mapping[str, Sequence[str]]) -> None:
        """Add the nodes that have not answered in a phase of round `number`, each with the ids of its messages."""
        for name, message_ids in unanswered.items():
            pause = min(MOST_ROUNDS, self._pause.get(name, 0) * 2 or 1)
            self._pause[name] = pause
            self._late[name] = Late(tuple(message_ids), number, phase, number + 1 + pause)

    def busy(self, number: int) -> frozenset[str]:
        """Receive late replies, and return the nodes that are busy at the start of round `number`."""
        names = {message_id: name for name, late in self._late.items() for message_id in late.message_ids}
        waiting = dict.fromkeys(names)
        if waiting:
            for outcome in pulled(self._grid, waiting, time.monotonic() + POLL_SECONDS):
                if outcome is None:  # nothing more has arrived
                    break
                name = names[outcome[0]]
                late = self._late.pop(name, None)
                self._pause.pop(name, None)
                if late is not None:
                    self._events.add(Event(late.round, late.phase, name, "late", detail="not counted"))
        self._late = {name: late for name, late in self._late.items() if number < late.until}
        return frozenset(self._late)
