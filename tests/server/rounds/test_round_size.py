"""The number of replies that a round waits for, on a grid whose clients reply after set delays."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind
from corymb.server import DynamicBackupWorkers, FlowerStrategy, RoundRecord, RoundSize, WaitForShare
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg, Model, Reply
from corymb.strategies.core.serialization import pack_memory, unpack_memory

SECONDS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.6]  # of the clients; the last one is slow


class Slow(LocalGrid):
    """A grid on which a reply can be pulled only after its client's delay."""

    stream = None  # type: ignore[assignment]  # replies are pulled

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        self.pushed = time.monotonic()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        passed = time.monotonic() - self.pushed
        ready = [
            id_
            for id_ in message_ids
            if id_ in self._waiting and passed >= SECONDS[self._waiting[id_].metadata.dst_node_id - 1000]
        ]
        return super().pull_messages(ready)


def quadratic(noise: float) -> ClientApp:
    """Make clients that move a tenth of the way to zero, plus noise. The loss is half the squared distance."""
    app = ClientApp()
    generator = torch.Generator().manual_seed(0)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        w = to_state(of_kind(message.content, ArrayRecord)[0])["w"]
        gradient = w + noise * torch.randn(w.shape, generator=generator)
        metrics = MetricRecord({"num-examples": 1, "loss": 0.5 * float(w.square().sum())})
        content: dict[str, ArrayRecord | MetricRecord] = {"arrays": to_arrays({"w": w - 0.1 * gradient}), "m": metrics}
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    return app


def numbers_of_replies(size: RoundSize[Any] | None, noise: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr("corymb.server.rounds.pulls.POLL_SECONDS", 0.002)
    monkeypatch.setattr("corymb.server.rounds.pulls.MAX_POLL_SECONDS", 0.002)
    records: list[RoundRecord] = []
    strategy = FlowerStrategy(FedAvg(), round_size=size, fraction_evaluate=0, on_round=records.append)
    strategy.start(Slow(quadratic(noise), len(SECONDS)), to_arrays({"w": torch.ones(20)}), num_rounds=5)
    return [len(record.admitted) for record in records]


def test_without_a_policy_a_round_waits_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers_of_replies(None, 0.0, monkeypatch) == [6] * 5


def test_a_round_waits_for_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers_of_replies(WaitForShare(0.5), 0.0, monkeypatch) == [3] * 5
    with pytest.raises(ValueError, match=r"share is 1.5; use a value in \(0, 1\]"):
        WaitForShare(1.5)


def test_rounds_do_not_wait_for_a_slow_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little noise all updates are nearly equal, so one is enough. The loss never rises."""
    counts = numbers_of_replies(DynamicBackupWorkers(rate=0.1), 0.01, monkeypatch)
    assert counts[0] == 6
    assert all(count < 6 for count in counts[2:])


def test_without_gain_a_round_waits_for_all() -> None:
    """The same holds if the loss rose, as it does here in the second round."""
    size, origin = DynamicBackupWorkers(), Model(torch.zeros(2))
    chosen, estimates = size.choose(5, size.initial())
    assert chosen == 5
    for loss in (1.0, 2.0):
        estimates = size.observer(estimates, origin).estimates(loss)
        estimates = size.after([1.0, 2.0], estimates)
    assert estimates.loss_rose
    assert size.choose(5, estimates)[0] == 5


def test_the_estimates_can_be_stored() -> None:
    """This includes the mean time of each reply over the rounds."""
    size, origin = DynamicBackupWorkers(rate=0.5), Model(torch.zeros(2))
    estimates = size.initial()
    for seconds, loss in (([0.1, 0.3], 2.0), ([0.3, 0.5, 0.9], 1.0)):
        observer = size.observer(estimates, origin)
        list(observer.watch(iter([Reply.of("a", torch.ones(2)), Reply.of("b", torch.tensor([0.5, 2.0]))])))
        estimates = size.after(seconds, observer.estimates(loss))
    assert estimates.times == pytest.approx((0.2, 0.4, 0.9))
    assert estimates.rounds == (2, 2, 1)
    plain, tensors = pack_memory(estimates)
    assert unpack_memory(size.initial(), json.loads(json.dumps(plain)), tensors) == estimates
