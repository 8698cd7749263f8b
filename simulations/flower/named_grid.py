"""Flower's grid with what its simulation lacks: names for the nodes, and a process that says who is online."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
from flwr.app import Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import NODE_UNAVAILABLE, node_info, quick_reply, stamp
from corymb.protocol.records import METRICS, of_kind
from corymb.simulations.participation import Participation

PARTITION = "partition-id"
WAIT_SECONDS = 300.0  # for nodes that Flower registers while the server already runs, and Ray starts up for
OFFLINE = Error(NODE_UNAVAILABLE, "The node is offline.")


def partition_reply(message: Message, partition: int) -> Message:
    """What a node answers when it is asked which partition it has."""
    return Message(RecordDict({METRICS: MetricRecord({PARTITION: partition})}), reply_to=message)


class NamedGrid(Grid):
    """`grid` with `names[i]` for the node that has partition `i`; who is offline answers as on a `LocalGrid`.

    Raises `TimeoutError` when nodes do not come, `ValueError` when none says that it has some partition.
    """

    complete = True

    def __init__(self, grid: Grid, names: Sequence[str], participation: Participation) -> None:
        self._grid, self._participation = grid, participation
        deadline = time.monotonic() + WAIT_SECONDS
        while len(ids := list(grid.get_node_ids())) < len(names):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Only {len(ids)} of {len(names)} nodes connected within {WAIT_SECONDS:.0f} s.")
            time.sleep(0.2)
        asked = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in ids]
        self._rows: dict[int, int] = {}
        why = ""
        for reply in grid.send_and_receive(asked, timeout=WAIT_SECONDS):
            if reply.has_error():
                why = why or f"; a node says: {reply.error.reason}"
            else:
                (metrics,) = of_kind(reply.content, MetricRecord)
                self._rows[reply.metadata.src_node_id] = int(metrics[PARTITION])  # type: ignore[arg-type]
        if missing := set(range(len(names))) - set(self._rows.values()):
            raise ValueError(f"No node says that it has partition {min(missing)} of {len(names)}{why}.")
        self._nodes = [
            node_info(node_id, names[row]) for node_id, row in sorted(self._rows.items(), key=lambda i: i[1])
        ]
        self._online = np.ones(len(names), dtype=np.bool_)
        self._offline: dict[str, Message] = {}  # to nodes that are
        self._numbers = count(1)

    def set_run(self, run: Any) -> None:
        """Take `run` as this grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run, as Flower describes one."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; Flower deprecates this in favour of the constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of all nodes, online or not, in the order of their partitions."""
        return [node.node_id for node in self._nodes]

    def get_nodes(self) -> list[Any]:
        """All nodes, online or not."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send `messages` to the nodes that are online. A push that trains begins a round of participation."""
        messages = list(messages)
        if any(message.metadata.message_type.startswith("train") for message in messages):
            self._online = self._participation.step()
        online = [self._online[self._rows[message.metadata.dst_node_id]] for message in messages]
        asked = [message for message, here in zip(messages, online, strict=True) if here]
        taken = list(self._grid.push_messages(asked)) if asked else []
        if len(taken) < len(asked):
            raise ValueError(f"Flower took {len(taken)} of {len(asked)} messages; the model may be too large for it.")
        sent = iter(taken)
        return [next(sent) if here else self._kept(m) for m, here in zip(messages, online, strict=True)]

    def _kept(self, message: Message) -> str:
        message_id = f"offline-{next(self._numbers)}"
        stamp(message, message_id)
        self._offline[message_id] = message
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to `message_ids` that are here."""
        wanted = list(message_ids)
        offline = [quick_reply(self._offline.pop(i), error=OFFLINE) for i in wanted if i in self._offline]
        others = [i for i in wanted if not i.startswith("offline-")]
        return offline + (list(self._grid.pull_messages(others)) if others else [])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages` and wait for their replies, `timeout` seconds at most."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        pending = set(self.push_messages(messages))
        replies: list[Message] = []
        while pending and time.monotonic() < deadline:
            found = self.pull_messages(pending)
            pending -= {reply.metadata.reply_to_message_id for reply in found}
            replies += found
            if not found:
                time.sleep(0.1)
        return replies
