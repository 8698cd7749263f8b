"""Iteration over replies as they arrive. It pulls one message id at a time, so at most one reply is in memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from math import inf

from flwr.app import Error, Message
from flwr.serverapp import Grid

from corymb.protocol.flower import unchecked_reply
from corymb.protocol.grids import StreamingGrid
from corymb.server.rounds.rejections import UNREADABLE

POLL_SECONDS = 0.2  # the first pause after a poll that brought no reply
MAX_POLL_SECONDS = 3.0  # the longest pause
TRIES = 3  # attempts to pull a reply before it counts as unreadable


def arrivals(
    grid: Grid, sent: Mapping[str, Message], timeout: float | None, enough: int | None = None
) -> Iterator[Message]:
    """Yield the replies to the messages `sent {message id: message}`, in the order in which they arrive.

    The iteration ends after all replies, after `timeout` seconds (None: no limit), or after `enough` replies that are
    not errors. Error replies are yielded too. They come from clients and from the SuperLink. This function makes one
    itself if the grid still cannot receive a reply after `TRIES` attempts, because the network fails or because the
    bytes are not a message. So a broken reply from one client cannot end the round.

    The timeout does not interrupt a pull: Flower's grid waits inside a pull until an upload that has begun is
    complete.
    """
    deadline = time.monotonic() + (inf if timeout is None else timeout)
    left = len(sent) if enough is None else enough
    for reply in _streamed(grid, sent, deadline) if isinstance(grid, StreamingGrid) else _polled(grid, sent, deadline):
        left -= not reply.has_error()
        yield reply
        del reply  # frees its memory before the next reply arrives
        if left <= 0:
            return


def _streamed(grid: StreamingGrid, sent: Mapping[str, Message], deadline: float) -> Iterator[Message]:
    for message_id, reply in grid.stream(sent):
        yield _checked_reply(sent[message_id], reply)
        del reply
        if time.monotonic() > deadline:
            return


def _polled(grid: Grid, sent: Mapping[str, Message], deadline: float) -> Iterator[Message]:
    pending = dict(sent)
    failed: Counter[str] = Counter()
    pause = POLL_SECONDS
    while pending:
        has_news = False
        for message_id in list(pending):
            try:
                replies = list(grid.pull_messages([message_id]))
            except Exception as error:
                failed[message_id] += 1
                if failed[message_id] >= TRIES:
                    yield _unreadable(pending.pop(message_id), f"{type(error).__name__}: {error}")
                continue
            if replies:
                has_news = True
                yield _checked_reply(pending.pop(message_id), replies.pop())
            if time.monotonic() > deadline:
                return
        pause = POLL_SECONDS if has_news else min(1.5 * pause, MAX_POLL_SECONDS)
        if pending and not has_news:
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                return


def _checked_reply(message: Message, reply: Message) -> Message:
    """Return `reply` if it refers to `message`, else an error reply.

    Otherwise a reply that refers to another node's message would count as that node's reply.
    """
    if reply.metadata.reply_to_message_id == message.metadata.message_id:
        return reply
    return _unreadable(message, "it refers to another message")


def _unreadable(message: Message, problem: str) -> Message:
    return unchecked_reply(message, error=Error(UNREADABLE, problem))
