"""A client answers a repeated request from memory, and stops training before the deadline."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import make_client_app
from corymb.client.memory import answer_from_memory
from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import set_message_id, set_task_identity


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORYMB_HOME", str(tmp_path))


def request(number: int, kind: str = "train", **config: Any) -> Message:
    set_task_identity(run_id=1, node_id=1)
    content = RecordDict({"config": ConfigRecord({"server-round": number, **config})})
    message = Message(content, 5, kind)
    set_message_id(message, f"m-{time.monotonic_ns()}")
    return message


def context() -> Context:
    return Context(1, 5, {}, RecordDict(), {})


def counting_app(calls: list[int]) -> ClientApp:
    app = ClientApp(mods=[answer_from_memory])

    @app.train()
    @app.evaluate()
    def _(message: Message, context: Context) -> Message:
        calls.append(1)
        metrics = MetricRecord({"num-examples": len(calls)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def number_in(reply: Message) -> Any:
    content: Any = reply.content
    return content["metrics"]["num-examples"]


def test_a_repeated_nonce_is_answered_from_memory() -> None:
    calls: list[int] = []
    app, state = counting_app(calls), context()
    first, again = request(1, nonce="a"), request(1, nonce="a")
    assert number_in(app(first, state)) == 1
    reply = app(again, state)
    assert number_in(reply) == 1
    assert reply.metadata.reply_to_message_id == again.metadata.message_id
    assert dict(reply.content["answered"]) == {"nonce": "a"}
    assert len(calls) == 1
    assert number_in(app(request(1, "evaluate", nonce="a"), state)) == 2  # another kind of message
    assert number_in(app(request(1, nonce="a"), state)) == 1
    assert number_in(app(request(2, nonce="b"), state)) == 3
    assert number_in(app(request(1, nonce="a"), state)) == 4  # only the last answer is kept


def test_without_a_nonce_nothing_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []
    app, state = counting_app(calls), context()
    for expected in (1, 2):
        reply = app(request(1), state)
        assert number_in(reply) == expected
        assert list(reply.content) == ["metrics"]
    assert not list((tmp_path / "answers").glob("*"))


def test_an_error_is_not_kept(tmp_path: Path) -> None:
    app, state = ClientApp(mods=[answer_from_memory]), context()

    @app.train()
    def _(message: Message, context: Context) -> Message:
        return Message(Error(99, "out of memory"), reply_to=message)

    assert app(request(1, nonce="a"), state).has_error()
    assert not list((tmp_path / "answers").glob("*"))


def test_answers_are_private_and_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    calls: list[int] = []
    app, state = counting_app(calls), context()
    app(request(1, nonce="a"), state)
    (path,) = (tmp_path / "answers").glob("*")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert number_in(app(request(1, nonce="a"), state)) == 2


def test_a_client_that_cannot_keep_its_answer_does_not_claim_to(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("not a folder")
    reply = counting_app([])(request(1, nonce="a"), context())
    assert list(reply.content) == ["metrics"]


def test_old_answers_are_deleted(tmp_path: Path) -> None:
    old = tmp_path / "answers" / "of-an-earlier-run"
    old.parent.mkdir()
    old.write_text("")
    os.utime(old, (0, 0))
    counting_app([])(request(1, nonce="a"), context())
    assert not old.exists()


def metrics_of_a_slow_client(batches: int, deadline: float, steps: int = 0) -> Any:
    """Return the metrics of a client with `batches` batches of ten examples, each of which takes 20 ms."""

    class Slow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return super().forward(x)

    data = TensorDataset(torch.randn(10 * batches, 2), torch.zeros(10 * batches, dtype=torch.int64))
    app = make_client_app(lambda: Slow(2, 2), lambda context: (data, None))
    message, state = request(1, deadline=deadline), context()
    message.content["arrays"] = to_arrays(nn.Linear(2, 2).state_dict())
    state.run_config["train.batch_size"] = 10
    if steps:
        state.run_config["train.steps"] = steps
    return app(message, state).content["metrics"]


def test_a_client_sends_what_it_has_before_the_deadline() -> None:
    metrics = metrics_of_a_slow_client(100, deadline=0.5)
    assert 0 < metrics["completed"] < 1
    assert metrics["completed"] == metrics["steps"] / 100
    assert metrics["num-examples"] == 10 * metrics["steps"]


def test_with_a_number_of_steps_the_share_of_them_counts() -> None:
    metrics = metrics_of_a_slow_client(1000, deadline=0.5, steps=50)
    assert 0 < metrics["completed"] == metrics["steps"] / 50 < 1
    assert metrics["num-examples"] == round(10_000 * metrics["completed"])


def test_a_client_that_is_too_late_trains_one_batch() -> None:
    metrics = metrics_of_a_slow_client(5, deadline=0.0001)
    assert (metrics["steps"], metrics["completed"]) == (1, 0.2)


def test_a_client_with_time_enough_reports_nothing_of_it() -> None:
    assert "completed" not in metrics_of_a_slow_client(2, deadline=60.0)
