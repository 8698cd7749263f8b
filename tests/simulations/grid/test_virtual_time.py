"""Virtual time: durations by hand, deadlines, busy clients, drop-outs, and a model that changes without rounds."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.sizes import HEADER
from corymb.server import FlowerStrategy, Journal, RoundRecord, RunFailed
from corymb.server.rounds.buffered_loop import BufferedLoop
from corymb.server.rounds.orders import add_order
from corymb.server.rounds.staleness import Asynchrony
from corymb.simulations import Experiment, LocalGrid, run
from corymb.simulations.data.devices import Devices, DevicesSettings
from corymb.simulations.grid.virtual_time import VirtualTimeGrid
from corymb.strategies import FedAvg

SIZE = 10 * 4 + HEADER  # bytes of the model


def client(message: Message, context: Context) -> Message:
    """A client that adds its own number, from 1, to the model."""
    (arrays,) = [r for r in message.content.values() if isinstance(r, ArrayRecord)]
    own = 1.0 + int(context.node_config["partition-id"])
    state = {"w": to_state(arrays)["w"] + own}
    metrics = MetricRecord({"num-examples": 1, "loss": own})
    return Message(RecordDict({"arrays": to_arrays(state), "metrics": metrics}), reply_to=message)


def timed(
    seconds: list[float], deadline: float = np.inf, drop_out: float = 0.0, bandwidth: float = np.inf
) -> VirtualTimeGrid:
    n = len(seconds)
    devices = Devices(np.array(seconds), np.full(n, bandwidth), np.full(n, bandwidth), drop_out)
    return VirtualTimeGrid(LocalGrid(client, n), devices, lambda row: 1, deadline, 0)


def start(grid: VirtualTimeGrid, rounds: int, **options: Any) -> tuple[list[RoundRecord], list[float], torch.Tensor]:
    records: list[RoundRecord] = []
    times: list[float] = []

    def note(record: RoundRecord) -> None:
        records.append(record)
        times.append(grid.now)

    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0, on_round=note, min_available_nodes=1, **options)
    result = strategy.start(grid, to_arrays({"w": torch.zeros(10)}), rounds, timeout=None)
    return records, times, to_state(result.arrays)["w"]


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    records, times, _ = start(timed([1.0, 5.0, 2.0]), 2)
    assert [len(record.admitted) for record in records] == [3, 3]
    assert times == [5.0, 10.0]


def test_bytes_take_time_both_ways() -> None:
    _, times, _ = start(timed([1.0, 1.0], bandwidth=SIZE / 3), 1)
    assert times == [pytest.approx(3 + 1 + 3)]


def test_a_late_reply_is_dropped_and_its_client_stays_busy() -> None:
    records, times, _ = start(timed([1.0, 5.0], deadline=3.0), 3)
    codes = [{v.node: v.code for v in record.verdicts} for record in records]
    # The second client needs until second 5 for the first round, then until 10, 15, ...
    assert [each["client-1"] for each in codes] == ["silent", "silent", "silent"]
    assert times == [3.0, 6.0, 9.0]


def test_drop_outs_are_errors() -> None:
    records, _, _ = start(timed([1.0] * 6, drop_out=0.5), 6)
    lost = [v for record in records for v in record.verdicts if v.code == "error"]
    assert 8 < len(lost) < 28
    assert "dropped out" in lost[0].reason


def test_a_buffer_of_two_by_hand() -> None:
    """Clients that take 1, 2 and 4 seconds; the model moves after each two replies, from where each began."""
    options = {"asynchrony": Asynchrony(buffer=2, concurrency=3, exponent=1.0)}
    records, times, model = start(timed([1.0, 2.0, 4.0]), 2, **options)
    # Seconds 1 and 2: clients 0 and 1 reply from version 0, so the model is (1 + 2) / 2.
    assert {v.node for v in records[0].admitted} == {"client-0", "client-1"}
    # Client 0 is asked again at second 2 and replies at 3, with +1 on the present model; client 2 replies at 4 with +3,
    # one version late, so half of it counts.
    assert {v.node for v in records[1].admitted} == {"client-0", "client-2"}
    assert times == [2.0, 4.0]
    torch.testing.assert_close(model, torch.full((10,), 1.5 + (1 + 3 / 2) / 2))


def test_a_buffer_of_all_clients_is_a_round() -> None:
    asynchronous = start(timed([1.0, 1.0, 1.0]), 3, asynchrony=Asynchrony(buffer=3, concurrency=3))
    rounds = start(timed([1.0, 1.0, 1.0]), 3)
    torch.testing.assert_close(asynchronous[2], rounds[2])
    assert asynchronous[1] == rounds[1] == [1.0, 2.0, 3.0]


def test_without_virtual_time_a_buffer_works_as_well() -> None:
    strategy = FlowerStrategy(FedAvg(), asynchrony=Asynchrony(2, 3), min_available_nodes=1)
    result = strategy.start(LocalGrid(client, 4), to_arrays({"w": torch.zeros(10)}), 5)
    assert strategy.state.round == 5
    assert to_state(result.arrays)["w"][0] > 0


def test_settings() -> None:
    made = DevicesSettings.model_validate({"seconds_per_example": [1.0, 2.0], "download": {"low": 10, "high": 100}})
    devices = made.make(5, np.random.default_rng(0))
    assert devices.seconds_per_example.tolist() == [1, 2, 1, 2, 1]
    assert ((devices.download >= 10) & (devices.download <= 100)).all()
    assert np.isinf(devices.upload).all()
    for table, problem in (
        ({"deadline": 3}, "set seconds_per_example, which the other keys need"),
        ({"seconds_per_example": 1, "buffer": 2, "wait_for": 0.5}, "leave out deadline and wait_for"),
        ({"seconds_per_example": {"low": 3, "high": 2}}, "low = 3.0 is above high = 2.0"),
    ):
        with pytest.raises(ValueError, match=problem):
            DevicesSettings.model_validate(table)


@pytest.mark.parametrize("rule", ["scaffold", "feddyn"])
def test_rules_whose_clients_remember_their_update_need_rounds(rule: str) -> None:
    with pytest.raises(ValueError, match=f"the rule '{rule}' needs rounds"):
        Experiment(name="late", rounds=2, rules=[rule], devices={"seconds_per_example": 0.01, "buffer": 2})
    timed = Experiment(name="timed", rounds=2, rules=[rule], devices={"seconds_per_example": 0.01})
    assert timed.rules[0].title == rule


def test_an_experiment_is_repeated_exactly(tmp_path: Path) -> None:
    rules: list[Any] = [
        "fedavg", {"name": "fedavg", "label": "buffer", "devices": {"buffer": 2, "concurrency": 4}},
        {"name": "fedavg", "label": "half", "devices": {"wait_for": 0.5}},
    ]  # fmt: skip
    experiment = Experiment(
        name="time", rounds=4, rules=rules, partition={"clients": 6},
        devices={"seconds_per_example": {"low": 0.1, "high": 1.0}, "upload": 1e4, "drop_out": 0.1},
    )  # fmt: skip
    one, two = (run(experiment, folder=tmp_path / name, progress=False) for name in "ab")
    assert [r.model_sha256 for r in one.runs] == [r.model_sha256 for r in two.runs]
    notes = [[record.notes["virtual-seconds"] for record in r.records] for r in one.runs]
    assert notes == [[record.notes["virtual-seconds"] for record in r.records] for r in two.runs]
    assert all(times == sorted(times) for times in notes)
    assert notes[2][-1] < notes[0][-1]  # half of the clients are there sooner
    assert {row["rule"]: row["virtual seconds"] for row in one.rows()}["fedavg"] == notes[0][-1]
    for over in ("round", "virtual seconds", "megabytes"):
        assert one.plot(over=over).axes[0].get_xlabel() == over


def test_a_run_in_virtual_time_that_was_stopped_begins_anew(tmp_path: Path) -> None:
    """Who was busy is not in the journal, so the rounds before the stop are run again, and the result is the same."""
    table: dict[str, Any] = {
        "name": "late", "rules": ["fedavg"], "partition": {"clients": 6},
        "devices": {"seconds_per_example": {"low": 0.1, "high": 1.0}, "deadline": 40.0, "drop_out": 0.2},
    }  # fmt: skip
    whole = run(Experiment(**table, rounds=4), folder=tmp_path / "whole", progress=False)
    run(Experiment(**table, rounds=2), folder=tmp_path / "cut", progress=False)
    config = tmp_path / "cut" / "config.toml"
    config.write_text(config.read_text().replace("rounds = 2", "rounds = 4"))  # as if it had been stopped
    resumed = run(Experiment(**table, rounds=4), folder=tmp_path / "cut", resume=True, progress=False)
    for one, two in zip(whole.runs[0].records, resumed.runs[0].records, strict=True):
        assert one.notes == two.notes
    assert whole.runs[0].model_sha256 == resumed.runs[0].model_sha256


def test_an_election_is_held_in_virtual_time(tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "name": "election", "rounds": 2, "rules": [{"name": "fedavg", "candidate_election": ["median"]}],
        "partition": {"clients": 4}, "devices": {"seconds_per_example": 0.1},
    }  # fmt: skip
    (finished,) = run(Experiment(**table), folder=tmp_path, progress=False).runs
    assert all("elected" in record.notes for record in finished.records)
    with pytest.raises(ValueError, match=r"devices\.buffer has no rounds, so there is no candidate_election"):
        Experiment(**table | {"devices": {"seconds_per_example": 1, "buffer": 2}})


def test_a_client_that_trains_two_models_takes_twice_as_long(tmp_path: Path) -> None:
    experiment = Experiment(
        name="two", rounds=1, rules=["fedavg", "ditto", "fedrep"], partition={"clients": 3, "kind": "iid"},
        model={"kind": "mlp"}, devices={"seconds_per_example": 0.1}, evaluate={"clients": True}, train={"epochs": 2},
    )  # fmt: skip
    seconds = [r.records[0].notes["virtual-seconds"] for r in run(experiment, folder=tmp_path, progress=False).runs]
    assert seconds[1:] == pytest.approx([2 * seconds[0], 1.5 * seconds[0]])


def test_a_grid_in_virtual_time_keeps_the_messages_itself() -> None:
    strategy = FlowerStrategy(FedAvg(), asynchrony=Asynchrony(2, 3), min_available_nodes=1)
    loop = BufferedLoop(strategy, timed([1.0, 2.0, 4.0]), strategy.asynchrony)  # type: ignore[arg-type]
    strategy.start(timed([1.0, 2.0, 4.0]), to_arrays({"w": torch.zeros(10)}), 1)  # sets the first model
    loop.run(4, Result(), ConfigRecord(), None)
    assert strategy.state.round == 4
    assert (loop._sent, loop._waiting) == ({}, {})


def test_without_rounds_a_run_waits_for_nodes() -> None:
    strategy = FlowerStrategy(FedAvg(), asynchrony=Asynchrony(2, 3), min_available_nodes=3, wait_seconds=1.0)
    with pytest.raises(TimeoutError, match="Only 2 of 3 required nodes connected"):
        strategy.start(LocalGrid(client, 2), to_arrays({"w": torch.zeros(10)}), 5)


def test_drift_without_rounds_is_measured_from_where_each_client_began() -> None:
    """Each client adds its number to each of ten parameters, whatever it received."""
    options = {"asynchrony": Asynchrony(buffer=2, concurrency=3, exponent=1.0), "drift": True}
    records, _, _ = start(timed([1.0, 2.0, 4.0]), 3, **options)
    lengths = {v.node: v.metrics["update-norm"] for record in records for v in record.admitted}
    expected = {f"client-{i}": (i + 1) * 10**0.5 for i in range(3)}
    assert lengths == pytest.approx(expected)


def test_a_run_whose_clients_end_keeps_its_last_version(tmp_path: Path) -> None:
    def exclude_all(record: RoundRecord) -> None:
        for client_name in ("client-0", "client-1") if record.round == 2 else ():
            add_order(tmp_path, "exclude", "ada", client_name)

    with closing(Journal(tmp_path)) as journal:
        strategy = FlowerStrategy(
            FedAvg(), fraction_evaluate=0, min_available_nodes=1, journal=journal, on_round=exclude_all,
            asynchrony=Asynchrony(buffer=2, concurrency=2),
        )  # fmt: skip
        with pytest.raises(RunFailed, match=r"No client .* for version 3, so the run ends with the model of version 2"):
            strategy.start(timed([1.0, 1.0]), to_arrays({"w": torch.zeros(10)}), 9)
        assert journal.about()["failed"].startswith("No client has sent")
        assert journal.last_whole_round() == 2
