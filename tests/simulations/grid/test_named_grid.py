from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict

from corymb.protocol.flower import NODE_UNAVAILABLE
from corymb.simulations.data.participation import Online
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.grid.named_grid import NamedGrid, partition_reply


def client(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    if message.metadata.message_type == "query":
        return partition_reply(message, partition)
    return Message(RecordDict({"metrics": MetricRecord({"partition": partition})}), reply_to=message)


class OneAtATime:
    """Only node 0 is online in round 0, only node 1 in round 1, and so on."""

    def __init__(self, nodes: int) -> None:
        self._nodes, self._round = nodes, -1

    def step(self) -> Online:
        self._round += 1
        online: Online = np.arange(self._nodes) == self._round % self._nodes
        return online


def named_grid() -> NamedGrid:
    unnamed = LocalGrid(client, ["", "", ""])
    return NamedGrid(unnamed, ["a", "b", "c"])


def test_nodes_are_named_by_their_partitions() -> None:
    assert [(node.node_id, node.name) for node in named_grid().get_nodes()] == [(1000, "a"), (1001, "b"), (1002, "c")]


def test_offline_nodes_reply_with_an_error_and_each_training_push_is_a_round() -> None:
    grid = with_availability(named_grid(), OneAtATime(3))
    for number in range(4):
        messages = [Message(RecordDict(), node.node_id, "train") for node in grid.get_nodes()]
        replies = grid.send_and_receive(messages)
        online = [reply.content["metrics"]["partition"] for reply in replies if not reply.has_error()]
        assert online == [number % 3]
        assert {reply.error.code for reply in replies if reply.has_error()} == {NODE_UNAVAILABLE}
        assert len(replies) == 3
        queries = [Message(RecordDict(), node.node_id, "evaluate") for node in grid.get_nodes()]
        assert sum(not reply.has_error() for reply in grid.send_and_receive(queries)) == 1  # the same round


def test_a_partition_without_a_node_is_an_error() -> None:
    def confused(message: Message, context: Context) -> Message:
        return partition_reply(message, 0)

    with pytest.raises(ValueError, match="No node reported partition 1 of 2"):
        NamedGrid(LocalGrid(confused, 2), ["a", "b"])


def test_the_error_of_a_failing_node_is_reported() -> None:
    def broken(message: Message, context: Context) -> Message:
        raise ModuleNotFoundError("No module named 'mydata' on this machine")

    with pytest.raises(ValueError, match="No module named 'mydata' on this machine"):
        NamedGrid(LocalGrid(broken, 2), ["a", "b"])
