"""How many replies a round waits for, on a grid whose sites answer after their own time."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind
from corymb.server import DynamicBackupWorkers, FlowerStrategy, Patience, RoundRecord, WaitForShare
from corymb.simulations.grid import LocalGrid
from corymb.strategies import FedAvg

SECONDS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.6]  # the last site is slow


class Slow(LocalGrid):
    """Replies can be pulled after their site's time."""

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
    """Sites that go a tenth of the way to zero, give or take; the loss is half the squared distance."""
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


def waited(patience: Patience | None, noise: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr("corymb.server.arrivals.POLL_SECONDS", 0.002)
    monkeypatch.setattr("corymb.server.arrivals.SLOWEST_POLL_SECONDS", 0.002)
    records: list[RoundRecord] = []
    strategy = FlowerStrategy(FedAvg(), patience=patience, fraction_evaluate=0, on_round=records.append)
    strategy.start(Slow(quadratic(noise), len(SECONDS)), to_arrays({"w": torch.ones(20)}), num_rounds=5)
    return [len(record.admitted) for record in records]


def test_without_patience_all_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(None, 0.0, monkeypatch) == [6] * 5


def test_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited(WaitForShare(0.5), 0.0, monkeypatch) == [3] * 5
    with pytest.raises(ValueError, match=r"share = 1.5 must lie in \(0, 1\]"):
        WaitForShare(1.5)


def test_a_slow_site_is_not_worth_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise every update says the same, so one is enough; the loss never rises."""
    counts = waited(DynamicBackupWorkers(rate=0.1), 0.01, monkeypatch)
    assert counts[0] == 6
    assert all(count < 6 for count in counts[2:])


def test_nothing_to_gain_takes_all() -> None:
    patience = DynamicBackupWorkers()
    assert patience.enough(5) == 5
    patience.after([1.0, 2.0], 1.0)
    patience.after([1.0, 2.0], 2.0)  # the loss rose
    assert patience.enough(5) == 5
