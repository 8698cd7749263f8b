"""Replies as they arrive: one message id is pulled at a time, so one reply at most is in memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from math import inf

from flwr.app import Error, Message
from flwr.serverapp import Grid

from corymb.protocol.flower import quick_reply
from corymb.protocol.grids import StreamingGrid
from corymb.server.rounds.rejections import UNREADABLE

POLL_SECONDS = 0.2  # between two looks at a grid that had nothing new, at first
SLOWEST_POLL_SECONDS = 3.0
TRIES = 3  # at a reply that cannot be received


def arrivals(
    grid: Grid, sent: Mapping[str, Message], timeout: float | None, enough: int | None = None
) -> Iterator[Message]:
    """Yield the replies to the messages `sent {id: message}` until all came or `timeout` seconds passed (None: never).

    `enough` replies that are no errors end it, too. Errors are replies as well: those of sites, those that a SuperLink
    makes, and, after some tries, those made here for a reply that the grid fails to receive, because of the network or
    because its bytes are no message. So one site's reply cannot end the round.

    A grid that waits inside a pull for an upload that has begun, as Flower's does, is waited for.
    """
    deadline = time.monotonic() + (inf if timeout is None else timeout)
    left = len(sent) if enough is None else enough
    for reply in _streamed(grid, sent, deadline) if isinstance(grid, StreamingGrid) else _polled(grid, sent, deadline):
        left -= not reply.has_error()
        yield reply
        del reply  # so that the next may take its memory
        if left <= 0:
            return


def _streamed(grid: StreamingGrid, sent: Mapping[str, Message], deadline: float) -> Iterator[Message]:
    for message_id, reply in grid.stream(sent):
        yield _answering(sent[message_id], reply)
        del reply
        if time.monotonic() > deadline:
            return


def _polled(grid: Grid, sent: Mapping[str, Message], deadline: float) -> Iterator[Message]:
    pending = dict(sent)
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
                    yield _unreadable(pending.pop(message_id), f"{type(error).__name__}: {error}")
                continue
            if replies:
                found = True
                yield _answering(pending.pop(message_id), replies.pop())
            if time.monotonic() > deadline:
                return
        pause = POLL_SECONDS if found else min(1.5 * pause, SLOWEST_POLL_SECONDS)
        if pending and not found:
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return


def _answering(message: Message, reply: Message) -> Message:
    """`reply`, if it says that it answers `message`: a reply to another could be taken for another node's."""
    if reply.metadata.reply_to_message_id == message.metadata.message_id:
        return reply
    return _unreadable(message, "it answers another message")


def _unreadable(message: Message, problem: str) -> Message:
    return quick_reply(message, error=Error(UNREADABLE, problem))
