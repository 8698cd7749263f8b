"""Clients in worker processes give what clients in this process give, whatever they do."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from corymb.protocol.codec import to_state
from corymb.server import FlowerStrategy, WaitForShare
from corymb.simulations import LocalGrid
from corymb.strategies import FedAvg


def draws(message: Message, context: Context) -> Message:
    """Train by adding random numbers from all global generators; count the messages in the state."""
    count = context.state.metric_records["count"]["n"] + 1 if "count" in context.state else 1  # type: ignore[operator]
    context.state["count"] = MetricRecord({"n": count})
    metrics = MetricRecord({"num-examples": 1, "n": count, "pid": os.getpid() if message.has_content() else 0})
    content = RecordDict({"metrics": metrics})
    if message.metadata.message_type == "train":
        state = to_state(next(record for record in message.content.values() if isinstance(record, ArrayRecord)))
        noise = torch.rand(3) + random.random() + float(np.random.rand())
        content["arrays"] = ArrayRecord({"w": state["w"] + noise})
    return Message(content, reply_to=message)


def message(grid: LocalGrid, row: int, kind: str = "query") -> Message:
    return Message(RecordDict({"m": MetricRecord({"x": row})}), list(grid.get_node_ids())[row], kind)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(workers: int) -> None:
    results = []
    for number in (1, workers):
        torch.manual_seed(1)
        grid = LocalGrid(draws, 5, workers=number)
        strategy = FlowerStrategy(FedAvg())
        result = strategy.start(grid, ArrayRecord({"w": torch.zeros(3)}), num_rounds=3)
        processes = {v.metrics["pid"] for v in strategy.record.admitted}
        assert (os.getpid() in processes) == (number == 1)
        assert {v.metrics["n"] for v in strategy.record.admitted} == {5}  # three trainings, two evaluations
        results.append(to_state(result.arrays)["w"])
        grid.close()
    assert torch.equal(*results)


def test_clients_run_at_the_same_time() -> None:
    def waits(message: Message, context: Context) -> Message:
        time.sleep(0.3)
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(waits, 4, workers=4)
    grid.send_and_receive([message(grid, row) for row in range(4)])  # forks
    started = time.monotonic()
    assert len(grid.send_and_receive([message(grid, row) for row in range(4)])) == 4
    assert time.monotonic() - started < 4 * 0.3
    grid.close()


class Odd(Exception):
    """It cannot be unpickled from its text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fails(message: Message, context: Context) -> Message:
    row = int(context.node_config["partition-id"])
    context.state["kept"] = MetricRecord({"n": 1})
    if row == 1:
        raise ValueError("no such column")
    if row == 2:
        raise Odd(1, 2)
    if row == 3:
        os._exit(7)
    return Message(RecordDict({"kept": MetricRecord({"n": len(context.state)})}), reply_to=message)


def test_a_failure_costs_its_clients_reply_and_a_dead_worker_is_replaced() -> None:
    grid = LocalGrid(fails, 6, workers=2)
    replies = grid.send_and_receive([message(grid, row) for row in range(6)])
    reasons = [reply.error.reason if reply.has_error() else "" for reply in replies]
    assert reasons == [
        "",
        "ValueError: no such column",
        "Odd: 1 and 2",
        "ChildProcessError: The process of the client ended with exit code 7.",
        "",
        "",
    ]
    again = grid.send_and_receive([message(grid, row) for row in (0, 5)])
    assert [reply.content.metric_records["kept"]["n"] for reply in again] == [1, 1]
    grid.close()


def test_messages_to_one_node_run_in_their_order() -> None:
    grid = LocalGrid(draws, 2, workers=2)
    ids = grid.push_messages([message(grid, 0), message(grid, 0), message(grid, 1)])
    counts: list[Any] = [reply.content.metric_records["metrics"]["n"] for reply in grid.pull_messages(ids)]
    assert counts == [1, 2, 1]
    grid.push_messages([message(grid, 0)])
    grid.finish()
    (last,) = grid.send_and_receive([message(grid, 0)])
    assert last.content.metric_records["metrics"]["n"] == 4
    grid.close()


def test_a_round_that_does_not_wait_for_all_leaves_the_next_one_alone() -> None:
    grid = LocalGrid(draws, 6, workers=2)
    for _ in range(3):
        strategy = FlowerStrategy(FedAvg(), round_size=WaitForShare(0.3), fraction_evaluate=0)
        strategy.start(grid, ArrayRecord({"w": torch.zeros(3)}), num_rounds=3)
        assert [v.code for v in strategy.record.verdicts].count("admitted") == 2
    (reply,) = grid.send_and_receive([message(grid, 0)])
    assert not reply.has_error()
    grid.close()
