"""Iteration over replies as they arrive. One message id is pulled at a time, so at most one reply is in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from math import inf

from flwr.app import Error, Message
from flwr.serverapp import Grid

from corymb.protocol.flower import unchecked_reply
from corymb.protocol.grids import StreamingGrid
from corymb.protocol.signatures import FORGED
from corymb.server.rounds.pulls import pulled
from corymb.server.rounds.rejections import UNREADABLE


def arrivals(
    grid: Grid, sent: Mapping[str, Message], timeout: float | None, enough: int | None = None
) -> Iterator[Message]:
    """Yield the replies to the messages `sent {message id: message}`, in the order in which they arrive.

    The iteration ends after all replies, after `timeout` seconds (None: no limit), or after `enough` replies that are
    not errors. Error replies are yielded too. They come from clients and from the SuperLink. This function makes one
    itself if the grid still cannot receive a reply after three attempts, because the network fails or because the
    bytes are not a message. So a broken reply from one client cannot end the round.

    The timeout holds even while an upload is slow: a pull that hangs is left alone; see `pulled`.
    """
    deadline = time.monotonic() + (inf if timeout is None else timeout)
    if isinstance(grid, StreamingGrid):
        replies = _streamed(grid, sent, deadline)
    else:
        replies = polled(grid, sent, dict.fromkeys(sent), deadline)
    yield from first(len(sent) if enough is None else enough, replies)


def first(number: int, replies: Iterator[Message]) -> Iterator[Message]:
    """Yield `replies` until `number` of them were no errors."""
    for reply in replies:
        number -= not reply.has_error()
        yield reply
        del reply  # frees its memory before the next reply arrives
        if number <= 0:
            return


def _streamed(grid: StreamingGrid, sent: Mapping[str, Message], deadline: float) -> Iterator[Message]:
    for message_id, reply in grid.stream(sent):
        yield _checked_reply(sent[message_id], reply)
        del reply
        if time.monotonic() > deadline:
            return


def polled(
    grid: Grid,
    sent: Mapping[str, Message],
    waiting: dict[str, None],
    deadline: float,
    attend: Callable[[], None] = lambda: None,
) -> Iterator[Message]:
    """Yield the replies to those of the messages `sent` whose ids are `waiting`, or an error reply in place of each
    that cannot be received.

    The function `attend` is called after each poll that brought no reply. The caller may change `sent` and `waiting`.
    """
    for each in pulled(grid, waiting, deadline):
        if each is None:
            attend()
            continue
        message_id, outcome = each
        if isinstance(outcome, Exception):
            problem = f"{type(outcome).__name__}: {outcome}"
            yield unchecked_reply(sent[message_id], error=Error(UNREADABLE, problem))
        else:
            yield _checked_reply(sent[message_id], outcome)
        del outcome, each


def _checked_reply(message: Message, reply: Message) -> Message:
    """Return `reply` if it refers to `message` and comes from its addressee, else an error reply.

    The grid has told which message the reply belongs to; what the reply itself says comes from the client.
    """
    metadata = reply.metadata
    if metadata.reply_to_message_id != message.metadata.message_id:
        return unchecked_reply(message, error=Error(FORGED, "it refers to another message"))
    if not reply.has_error() and metadata.src_node_id != message.metadata.dst_node_id:
        return unchecked_reply(message, error=Error(FORGED, "it says that it comes from another node"))
    return reply
