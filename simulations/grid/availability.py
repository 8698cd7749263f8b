"""Which nodes are online, on any grid: a process says so round by round, and who is offline answers with an error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import count
from math import inf
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from corymb.protocol.flower import NODE_UNAVAILABLE, quick_reply, stamp
from corymb.protocol.grids import StreamingGrid
from corymb.simulations.data.participation import Online, Participation
from corymb.simulations.grid.wrapped_grid import WrappedGrid

OFFLINE = Error(NODE_UNAVAILABLE, "The node is offline.")
POLL_SECONDS = 0.1


def with_availability(grid: Grid, participation: Participation) -> AvailabilityGrid:
    """`grid`, whose nodes are online as `participation` says: its i-th client is the grid's i-th node.

    The process moves one step with each push that trains. A node that is offline answers with the error that a
    SuperLink gives for it, so that Flower's strategies need not know, and rules know the whole population.
    """
    kind = StreamingAvailabilityGrid if isinstance(grid, StreamingGrid) else AvailabilityGrid
    return kind(grid, participation)


class AvailabilityGrid(WrappedGrid):
    """See `with_availability`."""

    def __init__(self, grid: Grid, participation: Participation) -> None:
        super().__init__(grid)
        self._participation = participation
        self._rows = {node_id: row for row, node_id in enumerate(grid.get_node_ids())}
        self._online: Online | None = None  # before the first push
        self._has_trained = False  # a push since then
        self._offline: dict[str, Message] = {}  # messages to nodes that are
        self._numbers = count(1)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send `messages` to the nodes that are online. A push that trains begins a round of participation."""
        messages = list(messages)
        trains = any(message.metadata.message_type.startswith("train") for message in messages)
        if self._online is None or (trains and self._has_trained):
            self._online = self._participation.step()
        self._has_trained = self._has_trained or trains
        rows = [self._rows.get(message.metadata.dst_node_id) for message in messages]
        online = [row is None or bool(self._online[row]) for row in rows]  # whom nobody knows the grid refuses
        sent = [message for message, here in zip(messages, online, strict=True) if here]
        taken = set(self._grid.push_messages(sent)) if sent else set()
        for message, here in zip(messages, online, strict=True):
            if not here:
                stamp(message, f"offline-{next(self._numbers)}")
                self._offline[message.metadata.message_id] = message
        ids = [message.metadata.message_id for message in messages]
        return [message_id for message_id in ids if message_id in taken or message_id in self._offline]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to `message_ids` that are here."""
        offline, others = self._divided(message_ids)
        return [reply for _, reply in offline] + (list(self._grid.pull_messages(others)) if others else [])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages` and wait for their replies, `timeout` seconds at most (None: for ever); in their order."""
        deadline = time.monotonic() + (inf if timeout is None else timeout)
        ids = self.push_messages(messages)
        replies: dict[str, Message] = {}
        while len(replies) < len(ids) and time.monotonic() < deadline:
            found = self.pull_messages([message_id for message_id in ids if message_id not in replies])
            replies |= {reply.metadata.reply_to_message_id: reply for reply in found}
            if not found:
                time.sleep(POLL_SECONDS)
        return [replies[message_id] for message_id in ids if message_id in replies]

    def _divided(self, message_ids: Iterable[str]) -> tuple[list[tuple[str, Message]], list[str]]:
        """The replies of nodes that are offline, with the ids of the messages, and the ids of all others."""
        offline, others = [], []
        for message_id in message_ids:
            message = self._offline.pop(message_id, None)
            if message is None:
                others.append(message_id)
            else:
                offline.append((message_id, quick_reply(message, error=OFFLINE)))
        return offline, others


class StreamingAvailabilityGrid(AvailabilityGrid):
    """See `with_availability`: around a grid that streams."""

    _grid: Any

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """See `StreamingGrid`; who is offline answers first."""
        offline, others = self._divided(message_ids)
        yield from offline
        yield from self._grid.stream(others)
