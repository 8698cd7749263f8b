from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from corymb.protocol.codec import to_state
from corymb.simulations.data.participation import Bernoulli
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.local_grid import LocalGrid

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content.array_records["arrays"]
    state = arrays.to_torch_state_dict(keep_input=False)  # removes the arrays from its message
    visits = int(context.state.metric_records.get("visits", MetricRecord({"n": 0}))["n"]) + 1  # type: ignore[arg-type]
    context.state["visits"] = MetricRecord({"n": visits})
    moved = {name: tensor + int(context.node_config["partition-id"]) for name, tensor in state.items()}
    metrics = MetricRecord(
        {"num-examples": 1, "visits": visits, "partitions": int(context.node_config["num-partitions"])}
    )
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"m": MetricRecord({"num-examples": 1, "lr": float(context.run_config["lr"])})}), reply_to=message
    )


def messages(grid: Grid, kind: str = "train") -> list[Message]:
    content = RecordDict({"arrays": ArrayRecord({"w": torch.zeros(2)}), "config": ConfigRecord()})
    return [Message(content, node_id, kind) for node_id in grid.get_node_ids()]


def test_flowers_fedavg_runs_on_a_local_grid() -> None:
    grid = LocalGrid(app, 4, run_config={"lr": 0.5})
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        assert context.run_config == {"lr": 0.5}
        result = FedAvg().start(grid, ArrayRecord({"w": torch.zeros(2)}), num_rounds=3)
        assert to_state(result.arrays)["w"].tolist() == [4.5, 4.5]  # three times the mean of 0, 1, 2, 3
        assert result.train_metrics_clientapp[3]["visits"] == 3  # the state of a Context persists
        assert result.evaluate_metrics_clientapp[1]["lr"] == 0.5

    server(grid=grid, context=grid.server_context())


def test_messages_may_share_a_content_which_stays_unchanged() -> None:
    grid = LocalGrid(app, 3)
    sent = messages(grid)
    replies = grid.send_and_receive(sent)
    assert [r.metadata.src_node_id for r in replies] == grid.get_node_ids()
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in sent]
    assert list(sent[0].content.array_records["arrays"]) == ["w"]


def test_a_client_runs_once_when_its_reply_is_pulled() -> None:
    runs = []

    def count(message: Message, context: Context) -> Message:
        runs.append(message.metadata.message_id)
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(count, 3)
    ids = grid.push_messages(messages(grid))
    assert runs == []
    assert len(grid.pull_messages(ids[1:2])) == 1
    assert runs == ids[1:2]
    assert grid.pull_messages([ids[1], "unknown"]) == []


def test_offline_nodes_reply_with_an_error_and_each_training_push_is_a_round() -> None:
    probabilities = np.full(200, 0.3)
    local = LocalGrid(app, 200, run_config={"lr": 1.0})
    grid = with_availability(local, Bernoulli(probabilities, np.random.default_rng(0)))
    online = Bernoulli(probabilities, np.random.default_rng(0))
    for _ in range(3):
        expected = online.step().tolist()
        replies = grid.send_and_receive(messages(grid))
        assert [not reply.has_error() for reply in replies] == expected
        assert {reply.error.code for reply in replies if reply.has_error()} == {5}
        # An evaluation in between belongs to the same round.
        assert [not reply.has_error() for reply in grid.send_and_receive(messages(grid, "evaluate"))] == expected


def test_an_exception_of_the_app_is_an_error_reply() -> None:
    def broken(message: Message, context: Context) -> Message:
        raise KeyError("lr")

    (reply,) = LocalGrid(broken, 1).send_and_receive(messages(LocalGrid(broken, 1)))
    assert (reply.error.code, reply.error.reason) == (2, "KeyError: 'lr'")


def test_an_app_that_returns_no_message_is_an_error() -> None:
    grid = LocalGrid(lambda message, context: None, 2)  # type: ignore[arg-type,return-value]
    assert [reply.error.code for reply in grid.send_and_receive(messages(grid))] == [2, 2]
    with pytest.raises(
        ValueError,
        match=r"Every client failed; the most frequent error \(2 times\): TypeError: The client app returned a None",
    ):
        grid.require_replies()


def test_an_empty_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 nodes"):
        LocalGrid(app, 0)
