"""Pulls of replies that can be left alone: a pull of Flower's grid blocks for as long as a slow upload lasts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Thread

from flwr.app import Message
from flwr.serverapp import Grid

from corymb.protocol.temporary import is_temporary
from corymb.server.rounds.patience import PATIENCE_SECONDS

POLL_SECONDS = 0.2  # the first pause after a poll that brought no reply
MAX_POLL_SECONDS = 1.0  # the longest pause, for up to 100 replies
STALL_SECONDS = 10.0  # a pull that takes longer goes on in its own thread, and the other replies are pulled meanwhile
MAX_STALLED = 32  # pulls that may go on at a time
TRIES = 3  # attempts to pull a reply before it counts as unreadable

Pulled = tuple[str, Message | Exception]  # a message id with its reply, or with why it cannot be received


def pulled(grid: Grid, waiting: dict[str, None], deadline: float) -> Iterator[Pulled | None]:
    """Yield the reply to each of the message ids that are keys of `waiting`, as soon as it has arrived.

    The caller may add or remove ids at any time. None is yielded after each poll of all ids that brought no reply. Ends
    after all replies, or at `deadline`, a value of `time.monotonic()`, even if a pull hangs: its thread is left alone,
    and its reply is dropped. One reply is pulled at a time; while an upload is slow, it and another one. While the
    SuperLink fails, a reply counts as not arrived.
    """
    pulls = _Pulls(grid)
    failed: Counter[str] = Counter()
    failing_since: dict[str, float] = {}
    pause = POLL_SECONDS
    while waiting:
        arrived = False
        for message_id in [each for each in waiting if each not in pulls.running] or [""]:  # none, if all have stalled
            if time.monotonic() >= deadline:
                return
            if message_id in waiting and len(pulls.running) < MAX_STALLED:
                pulls.start(message_id)
            # Waits for this pull, or for one that stalled before.
            for finished, outcome in pulls.finished(min(STALL_SECONDS, deadline - time.monotonic())):
                if not isinstance(outcome, Exception):
                    failing_since.pop(finished, None)
                elif is_temporary(outcome):
                    since = failing_since.setdefault(finished, time.monotonic())
                    outcome = None if time.monotonic() - since < PATIENCE_SECONDS else outcome
                failed[finished] += isinstance(outcome, Exception)
                is_over = outcome is not None and (isinstance(outcome, Message) or failed[finished] >= TRIES)
                if outcome is not None and is_over and finished in waiting:
                    del waiting[finished]
                    arrived = True
                    yield finished, outcome
                del outcome  # frees its memory before the next pull
        pause = POLL_SECONDS if arrived else min(1.5 * pause, max(MAX_POLL_SECONDS, len(waiting) / 100))
        if not arrived:
            yield None
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())) if waiting else 0.0)
            if time.monotonic() >= deadline:
                return


class _Pulls:
    """Pulls that run in threads of their own; `running` are the message ids of those that have not ended."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._outcomes: SimpleQueue[tuple[str, Message | Exception | None]] = SimpleQueue()
        self.running: set[str] = set()

    def start(self, message_id: str) -> None:
        """Start a pull."""
        self.running.add(message_id)
        Thread(target=self._pull, args=(message_id,), daemon=True).start()  # does not outlive the process

    def finished(self, seconds: float) -> Iterator[tuple[str, Message | Exception | None]]:
        """Yield the pulls that have ended; wait for the first of them for up to `seconds`.

        The outcome is None if the reply has not arrived.
        """
        wait = seconds > 0
        while self.running:
            try:
                message_id, outcome = self._outcomes.get(block=wait, timeout=seconds if wait else None)
            except Empty:
                return
            wait = False
            self.running.discard(message_id)
            yield message_id, outcome
            del outcome

    def _pull(self, message_id: str) -> None:
        outcome: Message | Exception | None
        try:
            replies = list(self._grid.pull_messages([message_id]))
            outcome = replies.pop() if replies else None
        except Exception as error:
            outcome = error
        self._outcomes.put((message_id, outcome))
