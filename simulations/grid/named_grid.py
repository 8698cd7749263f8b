"""Flower's grid with names for the nodes, which its simulation lacks, in the order of their partitions."""

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
WAIT_SECONDS = 300.0  # for nodes that Flower registers while the server already runs, and Ray starts up for


def partition_reply(message: Message, partition: int) -> Message:
    """What a node answers when it is asked which partition it has."""
    return Message(RecordDict({METRICS: MetricRecord({PARTITION: partition})}), reply_to=message)


class NamedGrid(WrappedGrid):
    """`grid` with `names[i]` for the node that has partition `i`.

    Raises `TimeoutError` when nodes do not come, `ValueError` when none says that it has some partition.
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
        why = ""
        for reply in grid.send_and_receive(queries, timeout=WAIT_SECONDS):
            if reply.has_error():
                why = why or f"; a node says: {reply.error.reason}"
            else:
                (metrics,) = of_kind(reply.content, MetricRecord)
                ids_by_row[int(metrics[PARTITION])] = reply.metadata.src_node_id  # type: ignore[arg-type]
        if missing := set(range(len(names))) - ids_by_row.keys():
            raise ValueError(f"No node says that it has partition {min(missing)} of {len(names)}{why}.")
        self._nodes = [node_info(ids_by_row[row], name) for row, name in enumerate(names)]

    def get_node_ids(self) -> list[int]:
        """The ids of all nodes, in the order of their partitions."""
        return [node.node_id for node in self._nodes]

    def get_nodes(self) -> list[Any]:
        """All nodes, in the order of their partitions."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send `messages`. Raises `ValueError` where Flower does not take all of them."""
        messages = list(messages)
        taken = list(self._grid.push_messages(messages))
        if len(taken) < len(messages):
            raise ValueError(
                f"Flower took {len(taken)} of {len(messages)} messages; the model may be too large for it."
            )
        return taken
