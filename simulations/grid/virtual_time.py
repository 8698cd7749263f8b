"""A grid in virtual time: replies arrive in the order in which the clients' devices would finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from flwr.app import Error, Message

from corymb.protocol.flower import CLIENT_APP_RAISED, unchecked_reply
from corymb.protocol.sizes import bytes_in, bytes_of
from corymb.simulations.data.devices import Devices
from corymb.simulations.grid.wrapped_grid import WrappedGrid

DROPPED = Error(CLIENT_APP_RAISED, "the client dropped out during the round")


@dataclass
class _Sent:
    """A training message: the client's row, when it starts, and the bytes of the message; later the reply."""

    message: Message
    row: int
    starts: float
    down: int
    arrives: float = inf
    reply: Message | None = None


class VirtualTimeGrid(WrappedGrid):
    """`grid`, whose clients have `devices`; client i is the i-th node of the grid.

    `examples(row)` is the number of examples that a client trains on in a round, repetitions included. `now` is the
    virtual time in seconds. A round ends at its last reply, or `deadline` seconds after it began; a reply that would
    arrive later is dropped, and its client starts the next round only when it has finished this one.
    """

    _grid: Any

    def __init__(self, grid: Any, devices: Devices, examples: Callable[[int], int], deadline: float, seed: int) -> None:
        super().__init__(grid)
        self._devices, self._examples, self._deadline = devices, examples, deadline
        self._rows = {node_id: row for row, node_id in enumerate(grid.get_node_ids())}
        self._busy_until = dict.fromkeys(self._rows.values(), 0.0)
        self._rng = np.random.default_rng([seed, 7])
        self._sent: dict[str, _Sent] = {}
        self.now = 0.0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send `messages` and return their ids."""
        messages = list(messages)
        ids = list(self._grid.push_messages(messages))
        for message in messages:
            row = self._rows.get(message.metadata.dst_node_id)
            if row is not None and message.metadata.message_type.startswith("train"):
                starts = max(self.now, self._busy_until[row])
                sent = _Sent(message, row, starts, bytes_in(message.content))
                self._sent[message.metadata.message_id] = sent
        return ids

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """See `StreamingGrid`; the clock moves on with each reply to a training message. Others take no time."""
        ids = list(message_ids)
        if others := [each for each in ids if each not in self._sent]:
            yield from self._grid.stream(others)
        began = self.now
        self._train(ids)
        timed = sorted((each for each in ids if each in self._sent), key=lambda each: (self._sent[each].arrives, each))
        try:
            for message_id in timed:
                sent = self._sent[message_id]
                if sent.arrives > began + self._deadline:
                    self.now = began + self._deadline
                    break
                self.now = max(self.now, sent.arrives)
                assert sent.reply is not None
                yield message_id, sent.reply
        finally:
            for message_id in timed:
                del self._sent[message_id]

    def next_arrival(self) -> tuple[str, Message] | None:
        """Return the next reply to any message, by its id, and move the clock; None if no message is under way."""
        self._train(list(self._sent))
        if not self._sent:
            return None
        message_id = min(self._sent, key=lambda each: (self._sent[each].arrives, each))
        sent = self._sent.pop(message_id)
        self.now = max(self.now, sent.arrives)
        assert sent.reply is not None
        return message_id, sent.reply

    def _train(self, ids: Iterable[str]) -> None:
        """Run the clients of the messages that have no reply yet, and find out when their replies arrive."""
        waiting = [each for each in ids if each in self._sent and self._sent[each].reply is None]
        for message_id, reply in self._grid.stream(waiting) if waiting else ():
            sent = self._sent[message_id]
            seconds = self._devices.seconds(sent.row, self._examples(sent.row), sent.down, bytes_of(reply))
            sent.arrives = self._busy_until[sent.row] = sent.starts + seconds
            sent.reply = reply
        for message_id in waiting:
            sent = self._sent[message_id]
            if sent.reply is not None and self._devices.drop_out and self._rng.random() < self._devices.drop_out:
                sent.reply = unchecked_reply(sent.message, error=DROPPED)
