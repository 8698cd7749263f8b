"""What the operator's page says, from journals that the round loop has written."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch

from corymb.pages import journals
from corymb.pages.app import _changes, make_app
from corymb.pages.journals import JournalReader
from corymb.pages.now import sentence
from corymb.pages.numbers import Federation, Runs
from corymb.pages.operator import Operator
from corymb.pages.research import payload
from corymb.pages.rows import Ask, RoundRow
from corymb.protocol.codec import to_arrays
from corymb.server import FlowerStrategy, QuorumMissed
from corymb.server.deployment.run import Progress, journal_of, last_words
from corymb.server.journal import Journal
from corymb.server.rounds.events import Event
from corymb.server.rounds.orders import Orders, add_order, read_orders, release
from corymb.simulations import Experiment, run
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.results.summary import experiments_under
from corymb.strategies import FedAvg
from corymb.tests.pages.world import NAMES, client, federation, make_kit, publish


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return federation(tmp_path_factory.mktemp("finished"), wrong="south")


def test_the_sentence() -> None:
    about = {"rounds": "50", "deadline": "300"}
    rounds = [RoundRow(11, 1.0, {}, {}, {}, {})]
    ask = Ask(12, "train", 1000.0, tuple("abcdefghijklmn"), tuple("abc"))
    said = sentence(about, rounds, ask, True, 1180.0, Orders())
    assert said == "Round 12 of 50, training: waiting for 3 of 14 sites, deadline in 2 min."
    assert "deadline over" in sentence(about, rounds, ask, True, 1400.0, Orders())
    assert sentence(about, rounds, None, True, 0, Orders()) == "Round 11 is finished, of 50."
    assert sentence({**about, "finished": "yes"}, rounds, ask, False, 0, Orders()) == "Finished after round 11 of 50."
    assert sentence({}, [], None, False, 0, Orders()) == "Ended after round 0."


def test_the_table_of_sites(finished: Federation) -> None:
    publish(finished.folder, online=("north", "south"), runs={"1": "finished:completed"})
    rows = {row["name"]: row for row in Operator(finished).sites()["rows"]}
    assert [row["state"] for row in rows.values()] == ["0 problem", "1 offline", "3 online"]
    assert rows["north"]["raster"] == "+++"
    assert rows["south"]["raster"] == "xxx"
    assert rows["north"]["share"] == pytest.approx(0.5)
    assert rows["south"]["error"].startswith("Round 3: south: tensor 'w' has NaN")
    assert list(rows) == ["south", "west", "north"]
    assert [row["name"] for row in Operator(finished).sites(order="name", offset=1, limit=1)["rows"]] == ["south"]
    with pytest.raises(ValueError, match="The order 'colour' is unknown"):
        Operator(finished).sites(order="colour")
    history = Operator(finished).site("south")
    assert [verdict["code"] for verdict in history["verdicts"]] == ["not-finite"] * 3


def test_totals_read_a_bounded_number_of_verdicts(finished: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = JournalReader(finished.runs / "run-1")
    monkeypatch.setattr(journals, "MAX_CELLS", 1)
    assert [reader.totals().last for _ in range(4)] == [1, 2, 3, 3]
    assert reader.totals().verdicts == {"admitted": 6, "not-finite": 3}


def test_requests_for_other_hosts_and_wrong_ones_are_refused(finished: Federation) -> None:
    transport = httpx.ASGITransport(make_app(finished))

    async def ask(method: str, path: str, host: str = "127.0.0.1") -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path)

    def answer(*request: str) -> httpx.Response:
        return asyncio.run(ask(*request))

    assert answer("GET", "/api/view").json()["sentence"] == "Finished after round 3 of 3."
    assert answer("GET", "/api/sites?order=colour").status_code == 400
    assert answer("GET", "/api/view", "evil.example").status_code == 400
    assert answer("GET", "/api/view?run=../../etc").json()["run"] == ""
    assert answer("GET", "/ready").status_code == 503  # no server runs in this test
    assert answer("POST", "/api/view").status_code == 405


def test_a_page_is_told_at_once_when_it_connects_and_of_each_change(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs" / "one")
    asks = journal.asks
    assert asks is not None

    async def told() -> list[str]:
        stream = _changes(Runs(tmp_path), "")
        found = [await anext(stream)]
        asks.note_event(Event(1, "train", "north", "replied", 1.0))
        return [*found, await anext(stream)]

    found = asyncio.run(told())
    journal.close()
    assert found == ["id: 0\nevent: change\ndata: round 0\n\n", "id: 1\nevent: change\ndata: round 0\n\n"]


def test_an_experiment_with_many_rounds_and_two_of_one_name(tmp_path: Path) -> None:
    experiment = Experiment(name="same", rounds=120, rules=["fedavg"], partition={"clients": 2}, data={"examples": 40})
    for name in ("one", "two"):
        run(experiment, folder=tmp_path / name, progress=False)
    found = payload([tmp_path / "one", tmp_path / "two"])
    assert [each["name"] for each in found["experiments"]] == ["same (one)", "same (two)"]
    assert len(found["experiments"][0]["runs"][0]["metrics"]["accuracy"]) == 120
    (tmp_path / "two" / "config.toml").write_text("rounds = 'many'")
    assert experiments_under(tmp_path) == [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(ValueError, match=r"two cannot be read: .*rounds = 'many'.*; work in the folder"):
        payload([tmp_path / "two"])

    async def served() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(Runs(tmp_path)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/api/research")

    shown = asyncio.run(served()).json()["experiments"]  # the page leaves out what cannot be read
    assert [each["name"] for each in shown] == ["same"]


def test_a_run_that_waits_for_sites_to_begin_says_so(tmp_path: Path) -> None:
    kit = make_kit(tmp_path)
    journal = Journal(kit / "var" / "corymb" / "runs" / "run-1", notes={"flower-run": "1"})
    strategy = FlowerStrategy(FedAvg(), journal=journal, min_available_nodes=5)
    grid = LocalGrid(client(), list(NAMES))
    with pytest.raises(TimeoutError, match="Only 3 of 5 required nodes"):
        strategy.start(grid, to_arrays({"w": torch.zeros(3)}), 40, 60)
    grid.close()
    journal.close()
    publish(kit, runs={"1": "running"})
    source = Federation(kit, parent=os.getppid())
    assert Operator(source).view()["sentence"] == "Waiting for 5 sites to begin; 3 are online."
    assert [n.value for n in source.numbers(time.time()) if n.metric == "corymb_sites_missing"] == [2]
    said = list(Progress(source.runs / "run-1", reminded=-100.0).lines())
    assert said == ["the run begins when 5 sites are online; see corymb status"]


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    kit = make_kit(tmp_path)
    journal = Journal(kit / "var" / "corymb" / "runs" / "run-1", notes={"flower-run": "1"})
    strategy = FlowerStrategy(FedAvg(), journal=journal, quorum=9, max_abandoned=1)
    grid = LocalGrid(client(), list(NAMES))
    with pytest.raises(QuorumMissed):
        strategy.start(grid, to_arrays({"w": torch.zeros(3)}), 4, 60)
    journal.begin(strategy.about(), resume=True)
    assert "failed" not in journal.about(), "a run that goes on has not failed"
    journal.close()
    journal = Journal(kit / "var" / "corymb" / "runs" / "run-2", notes={"flower-run": "2"})
    strategy = FlowerStrategy(FedAvg(), journal=journal, quorum=9, max_abandoned=1)
    with pytest.raises(QuorumMissed):
        strategy.start(grid, to_arrays({"w": torch.zeros(3)}), 4, 60)
    grid.close()
    journal.close()
    publish(kit, runs={"2": "finished:failed"})
    said = Operator(Federation(kit, parent=os.getppid())).view()["sentence"]
    assert said.startswith("Failed after round 1 of 4. A round had fewer admitted replies than the quorum of 9")
    (words,) = last_words(journal.folder, "finished:failed")
    assert words.startswith("A round had fewer admitted replies than the quorum of 9")
    assert words.endswith("With --set resume=true, a new run goes on after the last round.")


def test_pages_and_orders_find_the_run_under_way_whichever_journal_was_written_last(tmp_path: Path) -> None:
    """A run that goes on keeps the journal of the run before, under its name."""
    kit = make_kit(tmp_path)
    runs = kit / "var" / "corymb" / "runs"
    strategy = FlowerStrategy(FedAvg())
    for name, flower_run in (("run-1", "3"), ("run-2", "2")):
        with closing(Journal(runs / name, notes={"flower-run": flower_run})) as journal:
            journal.begin(strategy.about(), resume=False)
    found = []
    for states in ({"3": "running", "2": "finished:completed"}, {"3": "finished:completed", "2": "finished:completed"}):
        publish(kit, runs=states)
        reader = Federation(kit, parent=os.getppid()).journal()
        assert reader is not None
        found.append(reader.folder.name)
    assert found == ["run-1", "run-2"]
    assert journal_of(kit, 3) == runs / "run-1"
    assert journal_of(kit, 1) is None


def test_status_says_who_is_excluded_and_who_has_paused_the_run_under_way(tmp_path: Path) -> None:
    kit = make_kit(tmp_path)
    folder = kit / "var" / "corymb" / "runs" / "run-1"
    with closing(Journal(folder, notes={"flower-run": "1"})) as journal:
        journal.begin(FlowerStrategy(FedAvg()).about(), resume=False)
    add_order(folder, "exclude", "root", "south")
    add_order(folder, "pause", "anna")
    command = [sys.executable, "-m", "corymb.cli", "status", str(kit)]
    said = []
    for state in ("running", "finished:stopped"):
        publish(kit, online=("north",), runs={"1": state})
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "offline, excluded" in said[0]
    assert "anna has paused the run before its next round." in said[0]
    assert "excluded" not in said[1]
    assert "paused" not in said[1]


def test_a_run_that_goes_on_does_not_obey_a_pause_of_the_run_before(tmp_path: Path) -> None:
    add_order(tmp_path, "pause", "root")
    add_order(tmp_path, "exclude", "root", "north")
    release(tmp_path)
    assert read_orders(tmp_path).paused_by == ""
    assert read_orders(tmp_path).excluded == {"north"}
    count = len(read_orders(tmp_path).all)
    release(tmp_path)
    assert len(read_orders(tmp_path).all) == count, "there is nothing to release"
