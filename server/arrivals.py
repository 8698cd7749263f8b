"""Replies as they arrive: one message id is pulled at a time, so one reply at most is in memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS = 0.2  # between two looks at a grid that had nothing new, at first
SLOWEST_POLL_SECONDS = 3.0
TRIES = 3  # at a reply that cannot be received


def arrivals(
    grid: Grid, asked: Mapping[str, str], timeout: float, enough: int | None = None
) -> Iterator[tuple[str, Message | Exception]]:
    """Yield `(node, reply)` for the messages in `asked {message id: node}` until all came or `timeout` seconds passed.

    `enough` replies that are no errors end it, too.

    Errors are replies too. The node is the one that was asked: an error made by the SuperLink names
    another. A reply that a grid fails to receive, because of the network or because its bytes are no
    message, comes as the exception after some tries, so that one site's reply cannot end the round.

    A grid that waits inside a pull for an upload that has begun, as Flower's does, is waited for.
    """
    deadline = time.monotonic() + timeout
    left = len(asked) if enough is None else enough
    if stream := getattr(grid, "stream", None):  # a grid in process, which knows whose reply comes next
        for message_id, reply in stream(asked):
            left -= not reply.has_error()
            yield asked[message_id], reply
            del reply
            if left <= 0 or time.monotonic() > deadline:
                return
        return
    pending = dict(asked)
    failed: Counter[str] = Counter()
    pause = POLL_SECONDS
    while pending:
        found = False
        for message_id in list(pending):
            try:
                replies = list(grid.pull_messages([message_id]))
            except Exception as error:
                failed[message_id] += 1
                if failed[message_id] >= TRIES:
                    yield pending.pop(message_id), error
                continue
            if replies:
                found = True
                reply = replies.pop()
                left -= not reply.has_error()
                yield pending.pop(message_id), reply
                del reply  # so that the next may take its memory
                if left <= 0:
                    return
            if time.monotonic() > deadline:
                return
        pause = POLL_SECONDS if found else min(1.5 * pause, SLOWEST_POLL_SECONDS)
        if pending and not found:
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return
