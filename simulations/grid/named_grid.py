"""Flower's grid with named nodes in the order of their partitions; nodes of Flower's simulation have no names."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import node_info
from corymb.protocol.records import METRICS, of_kind
from corymb.simulations.grid.wrapped_grid import WrappedGrid

PARTITION = "partition-id"
WAIT_SECONDS = 300.0  # timeout; Flower registers nodes while the server already runs and Ray starts


def partition_reply(message: Message, partition: int) -> Message:
    """Return a node's reply to the query for its partition."""
    return Message(RecordDict({METRICS: MetricRecord({PARTITION: partition})}), reply_to=message)


class NamedGrid(WrappedGrid):
    """`grid` with the name `names[i]` for the node that has partition `i`.

    The constructor waits for all nodes and queries their partitions. Raises `TimeoutError` if not all nodes connect,
    and `ValueError` if no node reports a partition.
    """

    is_complete = True  # Flower registers all of them before the first round

    def __init__(self, grid: Grid, names: Sequence[str]) -> None:
        super().__init__(grid)
        deadline = time.monotonic() + WAIT_SECONDS
        while len(ids := list(grid.get_node_ids())) < len(names):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Only {len(ids)} of {len(names)} nodes connected within {WAIT_SECONDS:.0f} s.")
            time.sleep(0.2)
        queries = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in ids]
        ids_by_row: dict[int, int] = {}
        problem = ""
        for reply in grid.send_and_receive(queries, timeout=WAIT_SECONDS):
            if reply.has_error():
                problem = problem or f"; a node replied with: {reply.error.reason}"
            else:
                (metrics,) = of_kind(reply.content, MetricRecord)
                ids_by_row[int(metrics[PARTITION])] = reply.metadata.src_node_id  # type: ignore[arg-type]
        if missing := set(range(len(names))) - ids_by_row.keys():
            raise ValueError(f"No node reported partition {min(missing)} of {len(names)}{problem}.")
        self._nodes = [node_info(ids_by_row[row], name) for row, name in enumerate(names)]

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes, in the order of their partitions."""
        return [node.node_id for node in self._nodes]

    def get_nodes(self) -> list[Any]:
        """Return all nodes, in the order of their partitions."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send `messages` and return their ids. Raises `ValueError` if Flower does not accept all of them."""
        messages = list(messages)
        accepted = list(self._grid.push_messages(messages))
        if len(accepted) < len(messages):
            raise ValueError(
                f"Flower accepted {len(accepted)} of {len(messages)} messages; the model may be too large."
            )
        return accepted
