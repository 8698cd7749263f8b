"""What happens during a round of a deployment, as it happens: an entry in the journal and a line in the log each."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

log = logging.getLogger("flwr.corymb")
SHOWN = 5  # names in a log line


@dataclass(frozen=True)
class Event:
    """An event in a round: `what` happened with `node`.

    `what` is "asked", "asked again", "offline", "replied", "failed", "late", or a verdict of the door. `seconds` are
    those since the request, `size` the bytes of the model in the reply, and `at` is Unix time.
    """

    round: int
    phase: str
    node: str
    what: str
    seconds: float | None = None
    size: int = 0
    detail: str = ""
    at: float = field(default_factory=time.time)


class EventSink(Protocol):
    """Where events are stored."""

    def note_event(self, event: Event) -> None:
        """Store `event`."""


class EventLog:
    """Stores events in `sink`, if there is one, and writes them to the log if `visible`."""

    def __init__(self, sink: EventSink | None, visible: bool) -> None:
        self._sink, self._visible = sink, visible

    def add(self, event: Event, waiting: Iterable[str] = ()) -> None:
        """Store and log `event`. `waiting` are the nodes that have not answered."""
        self.store(event)
        if event.what == "asked":  # one line for all of them would be as long as the list of nodes
            return
        seconds = "" if event.seconds is None else f" after {event.seconds:.1f} s"
        size = f", {event.size / 1e6:.1f} MB" if event.size else ""
        names = some(waiting)
        rest = f"; waiting for {names}" if names else ""
        detail = f" ({event.detail})" if event.detail else ""
        self.log(
            "[ROUND %d] %s %s%s (%s%s)%s%s",
            event.round,
            event.node,
            event.what,
            seconds,
            event.phase,
            size,
            detail,
            rest,
            extra={"round": event.round, "site": event.node},
        )

    def store(self, event: Event) -> None:
        """Store `event` without a line in the log."""
        if self._sink is not None:
            self._sink.note_event(event)

    def log(self, text: str, *values: object, extra: Mapping[str, object] | None = None) -> None:
        """Write a line to the log; `extra` are fields for structured logs."""
        if self._visible:
            log.info(text, *values, extra=extra)


def some(names: Iterable[str]) -> str:
    """Return the first few of `names`, and how many there are besides."""
    listed = sorted(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
