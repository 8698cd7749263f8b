"""Replies as they arrive: one message id is pulled at a time, so one reply at most is in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS = 0.2  # between two looks at a grid that had nothing new


def arrivals(grid: Grid, asked: Mapping[str, str], timeout: float) -> Iterator[tuple[str, Message]]:
    """Yield `(node, reply)` for the messages in `asked {message id: node}` until all came or `timeout` seconds passed.

    Errors are replies too. The node is the one that was asked: an error made by the SuperLink names another.
    """
    pending = dict(asked)
    deadline = time.monotonic() + timeout
    while pending:
        found = False
        for message_id in list(pending):
            for reply in grid.pull_messages([message_id]):
                found = True
                yield pending.pop(message_id), reply
                del reply  # before the next one is pulled
                break
            if time.monotonic() > deadline:
                return
        if pending and not found:
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return
