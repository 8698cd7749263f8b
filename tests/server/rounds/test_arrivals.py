from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from corymb.protocol.codec import to_arrays
from corymb.server import FlowerStrategy
from corymb.server.rounds.arrivals import arrivals
from corymb.server.rounds.requests import push
from corymb.server.rounds.roster import connected, has_joined, sample, wait_for
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg
from corymb.tests.support import content


def echo(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


class Slow(LocalGrid):
    """A grid that never delivers the reply to the first message."""

    stream = None  # type: ignore[assignment]  # replies are pulled

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return super().pull_messages([id_ for id_ in message_ids if id_ != "message-1"])


def pushed(grid: LocalGrid) -> dict[str, Message]:
    return push(grid, [Message(RecordDict(), node_id, "train") for node_id in connected(grid).values()])


def test_a_missing_reply_does_not_delay_the_others() -> None:
    grid = Slow(echo, 4)
    started = time.monotonic()
    sources = [reply.metadata.src_node_id for reply in arrivals(grid, pushed(grid), timeout=0.5)]
    assert sources == [1001, 1002, 1003]
    assert time.monotonic() - started < 5


class Stalled(LocalGrid):
    """A grid whose pull of the second message hangs, as while a site uploads slowly; from the third on it is fine."""

    stream = None  # type: ignore[assignment]  # replies are pulled

    def __init__(self, seconds: float) -> None:
        super().__init__(echo, 5)
        self.seconds = seconds

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        if ids == ["message-2"]:
            time.sleep(self.seconds)
        return super().pull_messages(ids)


def test_a_slow_upload_delays_neither_the_others_nor_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corymb.server.rounds.pulls.STALL_SECONDS", 0.1)
    grid = Stalled(30)
    started = time.monotonic()
    times = [(reply.metadata.src_node_id, time.monotonic() - started) for reply in arrivals(grid, pushed(grid), 2.0)]
    assert [node for node, _ in times] == [1000, 1002, 1003, 1004]
    assert max(seconds for _, seconds in times) < 1
    assert 1.9 < time.monotonic() - started < 3


def test_a_slow_upload_that_ends_before_the_deadline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corymb.server.rounds.pulls.STALL_SECONDS", 0.1)
    grid = Stalled(1.0)
    nodes = [reply.metadata.src_node_id for reply in arrivals(grid, pushed(grid), 3.0)]
    assert nodes == [1000, 1002, 1003, 1004, 1001]


class Broken(Slow):
    """A grid that cannot receive the reply to the second message."""

    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        if ids == ["message-2"]:
            self.pulls += 1
            raise ConnectionError("reset by peer")
        return super().pull_messages(ids)


def test_a_reply_that_cannot_be_received_is_an_error_after_three_attempts() -> None:
    grid = Broken(echo, 3)
    replies = list(arrivals(grid, pushed(grid), 3.0))
    assert [reply.has_error() for reply in replies] == [False, True]
    assert "reset by peer" in str(replies[1].error.reason)
    assert grid.pulls == 3


def test_at_most_one_reply_is_in_memory() -> None:
    """Each reply must be freed before the next client trains."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    def site(message: Message, context: Context) -> Message:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return Message(content({"w": tensor}), reply_to=message)

    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0)
    strategy.start(LocalGrid(site, 8), to_arrays({"w": torch.zeros(1000)}), num_rounds=2)
    assert len(alive) == 16
    assert most == 0


def test_waiting_for_nodes_ends_after_the_timeout() -> None:
    with pytest.raises(TimeoutError, match="Only 2 of 3 required nodes connected within 0 s"):
        wait_for(LocalGrid(echo, 2), 3, timeout=0)


class Growing(LocalGrid):
    """Nodes register one by one, as in the first seconds of a deployment."""

    registered = 0
    is_complete = False

    def get_nodes(self) -> list[Any]:
        self.registered += 1
        return super().get_nodes()[: self.registered]


def test_waiting_for_nodes_ends_when_enough_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corymb.server.rounds.roster.POLL_SECONDS", 0)
    assert len(wait_for(Growing(echo, 9), 4, timeout=5)) == 4


def test_an_absence_of_the_superlink_is_no_absence_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers after 88 seconds; the nodes then have their minute to connect again."""
    now = 0.0

    class Away(Growing):
        def get_nodes(self) -> list[Any]:
            nonlocal now
            now += 0.0 if self.registered else 88.0
            return super().get_nodes()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("corymb.server.rounds.roster.time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    assert has_joined(Away(echo, 9), 4, 60.0)
    assert not has_joined(Growing(echo, 9), 200, 60.0), "nodes that are away are not waited for without end"


def test_names_that_are_not_unique_get_the_node_id() -> None:
    grid = LocalGrid(echo, ["a", "b", "b", ""])
    assert connected(grid) == {"a": 1000, "b-1001": 1001, "b-1002": 1002, "node-1003": 1003}


@given(st.sets(st.text(min_size=1), min_size=1), st.floats(0, 1), st.integers(), st.integers())
def test_samples_depend_on_names_and_seed_only(names: set[str], fraction: float, seed: int, number: int) -> None:
    chosen = sample(names, fraction, 2, seed, number)
    assert chosen == sample(sorted(names, reverse=True), fraction, 2, seed, number)
    assert set(chosen) <= names
    assert len(chosen) == (0 if fraction == 0 else min(len(names), max(2, int(fraction * len(names)))))


def test_rounds_have_different_samples() -> None:
    names = [str(i) for i in range(100)]
    assert sample(names, 0.1, 0, 1) != sample(names, 0.1, 0, 2)
