"""The server under crashes, lost, late and repeated replies, absent nodes and a full disk, in random orders.

The journal, the exchange and the round loop are the real ones; time and the network are the test's.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corymb.protocol.codec import to_state
from corymb.server import FlowerStrategy, Journal, NoReplyAdmitted
from corymb.server.journal import asks, journal
from corymb.server.rounds import asking, events, exchange, late, pulls, roster, round_journal, round_loop
from corymb.strategies import FedAvg
from corymb.tests.server.rounds.wire import FIRST_ID, Wire, initial_counts

ROUNDS, NODES = 3, 3
DEADLINE = 600.0
MODULES = (asking, events, exchange, late, pulls, roster, round_journal, round_loop)
# What happens before a pull: (action, number). A crash comes at the n-th point from here, a full disk lasts n points.
actions = st.one_of(
    st.tuples(st.sampled_from(["answer", "lose", "keep", "repeat"]), st.integers(0, NODES - 1)),
    st.tuples(st.just("wait"), st.sampled_from([1, 100, 700])),
    st.tuples(st.just("crash"), st.integers(0, 12)),
    st.tuples(st.just("full"), st.integers(1, 12)),
    st.tuples(st.just("away"), st.integers(0, 20)),  # ten seconds each
)


class Killed(BaseException):
    """The server's process has been killed."""


class World:
    """The wire, the clock and the disk, and the plan of what happens to them."""

    def __init__(self, plan: list[tuple[str, int]], remembers: bool = True) -> None:
        self.plan = list(plan)
        self.wire = Wire(NODES, self.before_pull, remembers)
        self.now = 1000.0
        self.steps = 0
        self.crash_in = -1  # points until the next crash; below 0: none
        self.full_for = 0  # points for which the disk is full
        self.crashes = 0
        self.lost_notes = False  # whether a crash came while the disk was full
        self.delivered: dict[str, Any] = {}
        self.returns: dict[int, float] = {}  # when a node that is away comes back

    def before_pull(self, wire: Wire) -> None:
        self.steps += 1
        action, number = self.plan.pop(0) if self.plan else ("answer", self.steps % NODES)
        node = wire.nodes[number % NODES]
        if action == "wait":
            self.now += number
        elif action == "crash":
            self.crash_in = number
        elif action == "full":
            self.full_for = number
        elif action == "away":
            self.returns[number % NODES] = self.now + 10 * number
        elif action == "repeat" and self.delivered:  # Flower does not do this, but nothing must depend on it
            self.wire.ready |= self.delivered
        elif node.queue and node.number not in self.wire.offline and action in ("answer", "lose"):
            self.wire.answer(node, is_lost=action == "lose")
            self.delivered |= self.wire.ready
        self.let_return()

    def let_return(self) -> None:
        """Tell the wire which nodes are away."""
        self.wire.offline = {number for number, until in self.returns.items() if until > self.now}

    def point(self) -> None:
        """A point at which the server may be killed."""
        if self.crash_in == 0:
            self.crash_in = -1
            self.crashes += 1
            self.lost_notes |= self.full_for > 0
            raise Killed
        self.crash_in = max(-1, self.crash_in - 1)

    def write(self) -> None:
        """A point at which the server writes to the disk."""
        self.point()
        if self.full_for:
            self.full_for -= 1
            self.lost_notes = True
            raise sqlite3.OperationalError("database or disk is full")

    def sleep(self, seconds: float) -> None:
        self.now += max(0.01, seconds)
        self.let_return()


@contextmanager
def played(world: World) -> Iterator[None]:
    """Give the server the clock of `world`, and let it be killed before and after each step that matters."""

    def between(function: Callable[..., Any], *points: Callable[[], None]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            points[0]()
            result = function(*args, **kwargs)
            points[-1]()
            return result

        return wrapped

    clock = SimpleNamespace(time=lambda: world.now, monotonic=lambda: world.now, sleep=world.sleep)
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            if hasattr(module, "time"):
                patch.setattr(module, "time", clock)
        patch.setattr(exchange, "push", between(vars(exchange)["push"], world.point))
        patch.setattr(asking.Asking, "accept", between(asking.Asking.accept, world.point))
        patch.setattr(asks, "write_message", between(vars(asks)["write_message"], world.write, world.point))
        patch.setattr(asks.Asks, "_execute", between(asks.Asks._execute, world.write, world.point))
        patch.setattr(journal, "save", between(vars(journal)["save"], world.write, world.point))
        patch.setattr(journal, "insert", between(vars(journal)["insert"], world.write, world.point))
        yield


def run_to_the_end(world: World, folder: Path) -> tuple[torch.Tensor, list[set[str]]]:
    """Run the rounds; start the server again after a crash. Return the counts, and each round's admitted nodes."""
    with played(world):
        while True:
            kept = Journal(folder)
            strategy = FlowerStrategy(
                FedAvg(), min_available_nodes=NODES, fraction_evaluate=0.0, journal=kept, resume=True
            )
            try:
                strategy.start(world.wire, initial_counts(ROUNDS, NODES), num_rounds=ROUNDS, timeout=DEADLINE)
                break
            except NoReplyAdmitted:
                break
            except Killed:
                kept._lock.release()  # as the kernel does for a process that is killed
                kept._database.close()
    with closing(kept):
        return to_state(strategy.sent_model())["counts"], [
            {v.node for v in record.admitted} for record in kept.rounds()
        ]


def check(plan: list[tuple[str, int]]) -> World:
    """Play `plan`. Each reply is counted once or not at all, as the journal says, and no node trains twice."""
    world = World(plan)
    with TemporaryDirectory() as folder:
        counts, admitted = run_to_the_end(world, Path(folder))
    assert len(admitted) == ROUNDS
    for number, names in enumerate(admitted):
        for node in range(NODES):
            expected = NODES / len(names) if f"node-{FIRST_ID + node}" in names else 0.0
            assert counts[number, node] == pytest.approx(expected)
    if not world.lost_notes:
        assert all(times == 1 for node in world.wire.nodes for times in node.trained.values())
    return world


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(plan=st.lists(actions, max_size=40))
def test_no_order_of_faults_loses_or_doubles_a_reply(plan: list[tuple[str, int]]) -> None:
    check(plan)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_ten_thousand_steps() -> None:
    tally: Counter[str] = Counter()

    @settings(max_examples=400, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    @given(plan=st.lists(actions, min_size=10, max_size=60))
    def run(plan: list[tuple[str, int]]) -> None:
        world = check(plan)
        tally.update(steps=world.steps, crashes=world.crashes, faults=len(plan))

    started = time.monotonic()
    while tally["steps"] < 10_000:
        run()
    print(f"{tally['steps']} steps, {tally['crashes']} crashes, 0 violations, {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize("point", range(13))
def test_a_crash_at_each_point(point: int) -> None:
    world = check([("crash", point)])
    assert world.crashes == 1
    assert all(node.trained == dict.fromkeys(range(1, ROUNDS + 1), 1) for node in world.wire.nodes)


def test_a_lost_reply_is_asked_for_again_and_answered_from_memory() -> None:
    world = check([("answer", 0), ("lose", 1), ("answer", 2), ("wait", 100)])
    assert world.wire.nodes[1].trained == dict.fromkeys(range(1, ROUNDS + 1), 1)
    assert world.wire.pushed[f"node-{FIRST_ID + 1}"] > ROUNDS


def test_a_note_of_a_round_whose_base_was_lost_does_not_count() -> None:
    """Round 1 could not be written, round 2 was asked, and after a crash the disk was full again."""
    check([
        ("wait", 1), ("full", 9), ("away", 1), ("away", 15), ("wait", 1), ("wait", 700), ("answer", 0), ("answer", 0),
        ("crash", 0), ("full", 1),
    ])  # fmt: skip


def test_a_node_that_is_away_for_half_a_minute_is_asked_when_it_is_back() -> None:
    first_round = [("answer", node) for node in range(NODES)]  # shows that the clients answer from memory
    world = check([*first_round, ("away", 3), ("answer", 1), ("answer", 2)])
    assert all(node.trained == dict.fromkeys(range(1, ROUNDS + 1), 1) for node in world.wire.nodes)


def test_a_client_of_another_make_is_never_asked_again() -> None:
    world = World([("answer", 0), ("lose", 1), ("answer", 2), ("wait", 100), ("wait", 400)], remembers=False)
    with TemporaryDirectory() as folder:
        _, admitted = run_to_the_end(world, Path(folder))
    lost = f"node-{FIRST_ID + 1}"
    assert lost not in admitted[0]
    assert all(times == 1 for node in world.wire.nodes for times in node.trained.values())


def test_a_node_that_owes_a_reply_is_left_out_of_the_next_round() -> None:
    """Node 1 works for the whole of round 1 and longer; its late reply is received and not counted."""
    world = World([("answer", 0), ("answer", 2), ("wait", 700), ("keep", 0), ("keep", 0)])
    with TemporaryDirectory() as folder:
        counts, admitted = run_to_the_end(world, Path(folder))
        with closing(sqlite3.connect(Path(folder) / "journal.sqlite")) as database:
            events_of = database.execute("SELECT round, what FROM events WHERE node = ? ORDER BY at", ("node-101",))
            happened = events_of.fetchall()
    assert ["node-101" in names for names in admitted] == [False, False, True]
    assert happened == [(1, "asked"), (1, "late"), (3, "asked"), (3, "replied")]
    assert counts[0, 1] == 0


def test_events_say_what_happened_when() -> None:
    world = World([("answer", 2), ("keep", 0), ("keep", 0), ("wait", 100), ("answer", 0)])
    with TemporaryDirectory() as folder:
        run_to_the_end(world, Path(folder))
        with closing(sqlite3.connect(Path(folder) / "journal.sqlite")) as database:
            rows = database.execute("SELECT node, what, seconds, bytes FROM events WHERE round = 1 ORDER BY at, rowid")
            happened = rows.fetchall()
    assert [row[:2] for row in happened[:3]] == [(f"node-{FIRST_ID + node}", "asked") for node in range(NODES)]
    replied = {node: seconds for node, what, seconds, _ in happened if what == "replied"}
    assert replied["node-102"] < 10 < 100 <= replied["node-100"]
    assert all(size > 0 for _, what, _, size in happened if what == "replied")
