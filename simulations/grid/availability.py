"""Simulated availability of the nodes of any grid: per round, some nodes are offline and reply with an error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import count
from math import inf
from typing import Any

import numpy as np
from flwr.app import Error, Message
from flwr.serverapp import Grid

from corymb.protocol.flower import NODE_UNAVAILABLE, set_message_id, unchecked_reply
from corymb.protocol.grids import StreamingGrid
from corymb.simulations.data.participation import Online, Participation
from corymb.simulations.grid.wrapped_grid import WrappedGrid

OFFLINE = Error(NODE_UNAVAILABLE, "The node is offline.")
POLL_SECONDS = 0.1


def with_availability(grid: Grid, participation: Participation, finished: int = 0) -> AvailabilityGrid:
    """Return `grid` with nodes that are online as `participation` decides; client i is the i-th node of the grid.

    The process is first advanced by the `finished` rounds of a run that is resumed.

    Each push of training messages advances the process by one step. The grid answers for an offline node with the
    error that a SuperLink sends, so that Flower's strategies work unchanged and rules still know all nodes.
    """
    for _ in range(finished):
        participation.step()
    kind = StreamingAvailabilityGrid if isinstance(grid, StreamingGrid) else AvailabilityGrid
    return kind(grid, participation)


class AvailabilityGrid(WrappedGrid):
    """A grid whose nodes are online or offline by a `participation` process; see `with_availability`."""

    def __init__(self, grid: Grid, participation: Participation) -> None:
        super().__init__(grid)
        self._participation = participation
        self._rows = {node_id: row for row, node_id in enumerate(grid.get_node_ids())}
        self._online: Online | None = None  # None before the first push
        self._has_trained = False  # whether a push has trained since the first step of the process
        self._offline: dict[str, Message] = {}  # messages to offline nodes, by message id, until they are pulled
        self._numbers = count(1)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send `messages` to the nodes that are online, and return the ids of all messages.

        A push with training messages begins a new round of participation.
        """
        messages = list(messages)
        trains = any(message.metadata.message_type.startswith("train") for message in messages)
        if self._online is None or (trains and self._has_trained):
            self._online = self._step()
        self._has_trained = self._has_trained or trains
        rows = [self._rows.get(message.metadata.dst_node_id) for message in messages]
        is_online = [row is None or bool(self._online[row]) for row in rows]  # the grid handles unknown nodes
        sent = [message for message, online in zip(messages, is_online, strict=True) if online]
        accepted = set(self._grid.push_messages(sent)) if sent else set()
        for message, online in zip(messages, is_online, strict=True):
            if not online:
                set_message_id(message, f"offline-{next(self._numbers)}")
                self._offline[message.metadata.message_id] = message
        ids = [message.metadata.message_id for message in messages]
        return [message_id for message_id in ids if message_id in accepted or message_id in self._offline]

    def _step(self) -> Online:
        """Return who is online in the next round. Raises `ValueError` for anything but a bool per node."""
        online = np.asarray(self._participation.step())
        if online.dtype != np.bool_ or online.shape != (len(self._rows),):
            raise ValueError(
                f"{type(self._participation).__name__}.step() returned {online.dtype}{list(online.shape)}; return "
                f"which clients are online: bool[{len(self._rows)}]."
            )
        return online

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to `message_ids` that have arrived."""
        offline, others = self._split(message_ids)
        return [reply for _, reply in offline] + (list(self._grid.pull_messages(others)) if others else [])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages`, wait for their replies, and return them in the order of the messages.

        Waits at most `timeout` seconds; None means without limit.
        """
        deadline = time.monotonic() + (inf if timeout is None else timeout)
        ids = self.push_messages(messages)
        replies: dict[str, Message] = {}
        while len(replies) < len(ids) and time.monotonic() < deadline:
            arrived = self.pull_messages([message_id for message_id in ids if message_id not in replies])
            replies |= {reply.metadata.reply_to_message_id: reply for reply in arrived}
            if not arrived:
                time.sleep(POLL_SECONDS)
        return [replies[message_id] for message_id in ids if message_id in replies]

    def _split(self, message_ids: Iterable[str]) -> tuple[list[tuple[str, Message]], list[str]]:
        """Return (message id, error reply) for the messages to offline nodes, and the ids of all other messages."""
        offline, others = [], []
        for message_id in message_ids:
            message = self._offline.pop(message_id, None)
            if message is None:
                others.append(message_id)
            else:
                offline.append((message_id, unchecked_reply(message, error=OFFLINE)))
        return offline, others


class StreamingAvailabilityGrid(AvailabilityGrid):
    """An `AvailabilityGrid` around a `StreamingGrid`."""

    _grid: Any

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """See `StreamingGrid`; the error replies of offline nodes come first."""
        offline, others = self._split(message_ids)
        yield from offline
        yield from self._grid.stream(others)
