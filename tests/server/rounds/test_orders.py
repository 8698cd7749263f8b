"""Orders of operators to a run under way."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from corymb.pages.journals import JournalReader
from corymb.pages.numbers import Runs
from corymb.pages.operator import Operator
from corymb.protocol.codec import to_arrays
from corymb.server import FlowerStrategy, Journal
from corymb.server.rounds.orders import add_order, read_orders
from corymb.server.rounds.staleness import Asynchrony
from corymb.simulations import LocalGrid
from corymb.strategies import FedAvg
from corymb.tests.pages.world import client, run_rounds


def test_orders_are_read_in_their_order(tmp_path: Path) -> None:
    assert read_orders(tmp_path).all == ()
    for action, site in (("pause", ""), ("exclude", "north"), ("exclude", "south"), ("include", "north")):
        add_order(tmp_path, action, "ada", site)
    orders = read_orders(tmp_path)
    assert (orders.paused_by, orders.stopped_by, set(orders.excluded)) == ("ada", "", {"south"})
    add_order(tmp_path, "stop", "ada")
    add_order(tmp_path, "resume", "ben")
    assert (read_orders(tmp_path).paused_by, read_orders(tmp_path).stopped_by) == ("", "")
    add_order(tmp_path, "stop", "ben")
    with (tmp_path / "orders.jsonl").open("a") as file:
        file.write('{"action": "pau')  # cut off
    orders = read_orders(tmp_path)
    assert (orders.paused_by, orders.stopped_by, len(orders.all)) == ("", "ben", 7)


@pytest.mark.parametrize(("action", "site", "problem"), [
    ("halt", "", "The action 'halt' is unknown; use one of pause, resume"),
    ("exclude", "", "exclude needs the name of a site"),
    ("pause", "north", "pause takes no site"),
])  # fmt: skip
def test_wrong_orders(action: str, site: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        add_order(tmp_path, action, "ada", site)
    assert not (tmp_path / "orders.jsonl").exists()


def until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_is_paused_goes_on_without_a_site_and_is_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "run-1"
    folder.mkdir()
    add_order(folder, "pause", "ada")
    running = threading.Thread(target=run_rounds, args=(folder, 500), kwargs={"quorum": 1, "seconds": 0.02})
    running.start()
    until(lambda: (folder / "journal.sqlite").exists())
    reader, page = JournalReader(folder), Operator(Runs(tmp_path))
    time.sleep(0.5)
    assert reader.last_round() == 0
    assert page.view()["sentence"] == "Paused by ada after round 0 of 500."
    add_order(folder, "exclude", "ben", "south")
    add_order(folder, "resume", "ben")
    until(lambda: reader.last_round() >= 3)
    assert {verdict.node for verdict in reader.verdicts(1, 3)} == {"north", "west"}
    assert {row["name"]: row["state"] for row in page.sites()["rows"]}.get("south", "1 excluded") == "1 excluded"
    add_order(folder, "include", "ben", "south")
    last = reader.last_round()
    until(lambda: reader.last_round() >= last + 2)
    assert {verdict.node for verdict in reader.verdicts(last + 2, last + 2)} == {"north", "south", "west"}
    add_order(folder, "stop", "ada")
    running.join(60)
    assert not running.is_alive()
    assert reader.last_round() < 500
    assert page.view()["sentence"] == f"Stopped by ada after round {reader.last_round()} of 500."
    assert "finished" not in reader.about()  # so that it can go on
    noted = [(event.what, event.node, event.detail) for event in reader.events(0, 100)]
    orders = [each for each in noted if each[2].startswith("by ")]
    assert orders[:2] == [("exclude", "south", "by ben"), ("resume", "", "by ben")]  # and nothing from before the start


@pytest.mark.parametrize("asynchrony", [None, Asynchrony(buffer=2, concurrency=2)])
def test_a_run_that_waits_for_nodes_can_be_stopped(asynchrony: Asynchrony | None, tmp_path: Path) -> None:
    class Growing(LocalGrid):
        is_complete = False  # more nodes may join

    def run_alone() -> None:
        with closing(Journal(tmp_path)) as journal, closing(Growing(client(), 1)) as grid:
            strategy = FlowerStrategy(FedAvg(), journal=journal, min_available_nodes=2, asynchrony=asynchrony)
            strategy.start(grid, to_arrays({"w": torch.zeros(3)}), 5)

    running = threading.Thread(target=run_alone)
    running.start()
    until(lambda: (tmp_path / "journal.sqlite").exists())
    time.sleep(0.7)
    assert running.is_alive()
    add_order(tmp_path, "stop", "ada")
    running.join(10)
    assert not running.is_alive()
    reader = JournalReader(tmp_path)
    assert reader.last_round() == 0
    assert [event.detail for event in reader.events()] == ["by ada"]


def test_a_run_without_rounds_reads_orders_too(tmp_path: Path) -> None:
    folder = tmp_path / "run-1"
    folder.mkdir()
    add_order(folder, "exclude", "ada", "south")
    options = {"seconds": 0.02, "quorum": 0, "asynchrony": Asynchrony(buffer=2, concurrency=2)}
    running = threading.Thread(target=run_rounds, args=(folder, 500), kwargs=options)
    running.start()
    until(lambda: (folder / "journal.sqlite").exists())
    reader = JournalReader(folder)
    until(lambda: reader.last_round() >= 3)
    add_order(folder, "stop", "ada")
    running.join(60)
    assert not running.is_alive()
    assert 3 <= reader.last_round() < 500
    assert {verdict.node for verdict in reader.verdicts(1, 3) if verdict.code == "admitted"} == {"north", "west"}
    assert "finished" not in reader.about()
