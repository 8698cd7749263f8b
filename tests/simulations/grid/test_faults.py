"""Faults that users found in LocalGrid, one test each: it must mean what Flower's own simulation means."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict

from corymb.simulations import LocalGrid


def message(grid: LocalGrid, row: int, kind: str = "train") -> Message:
    return Message(RecordDict({"numbers": MetricRecord()}), list(grid.get_node_ids())[row], kind)


def reply(message: Message, value: float) -> Message:
    return Message(RecordDict({"numbers": MetricRecord({"value": value})}), reply_to=message)


def value(message: Message) -> Any:
    return message.content["numbers"]["value"]


def counting(message: Message, context: Context) -> Message:
    """Count the messages of this node in its state."""
    count = context.state.metric_records["count"]["value"] + 1 if "count" in context.state else 1.0  # type: ignore[operator]
    context.state["count"] = MetricRecord({"value": count})
    return reply(message, count)


def test_f2_a_message_that_nobody_pulls_runs_before_a_later_one() -> None:
    grid = LocalGrid(counting, 2)
    grid.push_messages([message(grid, 0), message(grid, 0)])
    (later,) = grid.send_and_receive([message(grid, 0, "query")])
    assert value(later) == 3


def test_f2_the_rest_runs_at_the_end() -> None:
    grid = LocalGrid(counting, 2)
    ids = grid.push_messages([message(grid, 0), message(grid, 1)])
    grid.finish()
    assert grid.replies == 2
    assert list(grid.pull_messages(ids)) == []


def test_f3_clients_do_not_change_the_servers_generators() -> None:
    def seeds(message: Message, context: Context) -> Message:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return reply(message, 0.0)

    drawn = []
    for app in (counting, seeds):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        grid = LocalGrid(app, 2)
        grid.send_and_receive([message(grid, 0), message(grid, 1)])
        drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


def test_f4_one_client_runs_at_a_time() -> None:
    running: list[int] = []

    def alone(message: Message, context: Context) -> Message:
        running.append(1)
        time.sleep(0.01)
        most = len(running)
        running.pop()
        return reply(message, float(most))

    grid = LocalGrid(alone, 8)
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda row: grid.send_and_receive([message(grid, row)]), range(8))
        assert [value(each[0]) for each in replies] == [1.0] * 8


def test_f5_replies_after_the_deadline_are_dropped() -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.2 if context.node_config["partition-id"] else 0.0)
        return reply(message, 0.0)

    grid = LocalGrid(slow, 3)
    replies = grid.send_and_receive([message(grid, row) for row in range(3)], timeout=0.1)
    assert [each.metadata.src_node_id for each in replies] == list(grid.get_node_ids())[:1]


def test_f7_the_state_of_a_client_that_raised_is_not_kept() -> None:
    def fails_on_query(message: Message, context: Context) -> Message:
        answer = counting(message, context)
        context.state.metric_records["count"]["inside"] = 1.0
        if message.metadata.message_type == "query":
            raise RuntimeError("after the change")
        return answer

    grid = LocalGrid(fails_on_query, 1)
    assert value(grid.send_and_receive([message(grid, 0)])[0]) == 1
    assert grid.send_and_receive([message(grid, 0, "query")])[0].has_error()
    assert value(grid.send_and_receive([message(grid, 0)])[0]) == 2


def test_f10_a_message_to_an_unknown_node_is_not_sent() -> None:
    grid = LocalGrid(counting, 1)
    assert grid.push_messages([Message(RecordDict(), 99, "train")]) == []
