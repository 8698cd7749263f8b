"""The gate at a site: approvals, limits in time, settings, what may leave, and the ledger."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from corymb.client.gate.gate import Gate
from corymb.client.gate.ledger import Ledger, in_words
from corymb.client.gate.policy import Refusal, SitePolicy, approve, template
from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import set_message_id, set_task_identity

APP = b"the bundle of an app"
HASH = hashlib.sha256(APP).hexdigest()


def model(value: float = 1.0) -> ArrayRecord:
    return to_arrays({"w": torch.tensor([1.0, 1.0, value])})


NOON = datetime(2026, 11, 28, 12)
APPROVED = f'[[approved]]\napp = "{HASH}"\npurpose = "Study 17"\nexpires = 2026-12-01\n'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a memory of answers of its own."""
    monkeypatch.setenv("CORYMB_HOME", str(tmp_path / "home"))


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


def gate_with(tmp_path: Path, policy: str, clock: Clock | None = None) -> Gate:
    (tmp_path / "policy.toml").write_text(policy)
    return Gate(tmp_path, clock or Clock())


def request(kind: str = "train", nonce: str = "n-1") -> Message:
    set_task_identity(run_id=7, node_id=1)
    config = ConfigRecord({"train.batch_size": 64, "a": 1, "nonce": nonce})
    message = Message(RecordDict({"arrays": model(), "config": config}), 5, kind, group_id="3")
    set_message_id(message, "m-1")
    return message


def honest(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 10, "loss": 0.5, "patients": 41})
    return Message(RecordDict({"arrays": to_arrays({"w": torch.ones(3)}), "metrics": metrics}), reply_to=message)


def never(message: Message, context: Context) -> Message:
    raise AssertionError("The app was called.")


def context() -> Context:
    return Context(7, 5, {}, RecordDict(), {"train.batch_size": 32})


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("", "is not approved at this site"),
        ("pause = true\n" + APPROVED, "the site has paused"),
        (APPROVED.replace("2026-12-01", "2026-11-28"), "has expired on 2026-11-28"),
        ('from_hour = "20:00"\nto_hour = "06:00"\n' + APPROVED, "runs tasks from 20:00 to 06:00 only"),
        ("metricks = []\n" + APPROVED, "the site's policy is invalid: metricks is not a known key"),
        ("metrics = [\n", "the site's policy cannot be read"),
        (APPROVED.replace(HASH, "f" * 63), "the site's policy is invalid: approved"),
    ],
)
def test_a_refusal_says_why_and_is_in_the_ledger(policy: str, problem: str, tmp_path: Path) -> None:
    gate = gate_with(tmp_path, policy)
    gate.admit(APP)
    with pytest.raises(Refusal, match=problem):
        gate.around(never)(request(), context())
    (entry,) = Ledger(tmp_path / "ledger.jsonl").entries()
    assert (entry["event"], entry["app"]) == ("refused", HASH)
    assert problem in entry["reason"]


def test_an_empty_round_needs_no_approval_and_calls_no_app(tmp_path: Path) -> None:
    gate = gate_with(tmp_path, "pause = true\n")
    gate.admit(APP)
    reply = gate.around(never)(request("query.corymb_empty_round"), context())
    gate.release(reply)
    assert (reply.has_error(), list(reply.content)) == (False, [])
    (entry,) = Ledger(tmp_path / "ledger.jsonl").entries()
    assert [entry[key] for key in ("event", "kind", "bytes")] == ["left", "query.corymb_empty_round", 0]


def test_the_template_is_valid_and_approves_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(template(signed_tasks=True))
    assert SitePolicy.read(tmp_path / "policy.toml").approved == []
    uncommented = re.sub(r"^# (?=[\[\"a-z_]+(\]|\"? =))", "", template(signed_tasks=True), flags=re.MULTILINE)
    uncommented = re.sub(r"^# (?=[\[\"])", "", uncommented, flags=re.MULTILINE)
    (tmp_path / "policy.toml").write_text(uncommented.replace("the SHA-256 of the app", HASH))
    assert SitePolicy.read(tmp_path / "policy.toml").approved[0].app == HASH


def test_a_task_that_is_approved_runs_with_the_sites_settings_and_only_listed_metrics_leave(tmp_path: Path) -> None:
    policy = 'metrics = ["num-examples", "loss"]\n[settings]\n"train.batch_size" = 8\n' + APPROVED
    gate = gate_with(tmp_path, policy)
    gate.admit(APP)
    seen: list[Any] = []

    def app(message: Message, context: Context) -> Message:
        seen.append((dict(message.content["config"]), context.run_config["train.batch_size"]))
        return honest(message, context)

    reply = gate.around(app)(request(), context())
    gate.release(reply)
    assert seen == [({"train.batch_size": 8, "a": 1, "nonce": "n-1"}, 8)]
    assert dict(reply.content["metrics"]) == {"num-examples": 10, "loss": 0.5}
    ran, left = Ledger(tmp_path / "ledger.jsonl").entries()
    assert [ran[key] for key in ("event", "purpose", "run", "round", "kind")] == ["ran", "Study 17", "7", "3", "train"]
    assert (left["event"], left["withheld"], left["arrays"]) == ("left", ["patients"], 1)
    assert left["metrics"] == {"num-examples": 10, "loss": 0.5}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e7])
def test_a_model_with_a_wrong_number_stays_at_the_site(number: float, tmp_path: Path) -> None:
    gate = gate_with(tmp_path, "largest_number = 1e6\n" + APPROVED)
    gate.admit(APP)
    gate.around(lambda message, context: Message(RecordDict(), reply_to=message))(request(), context())
    with pytest.raises(Refusal, match=r"the array 'w' has NaN or numbers beyond 1e\+06"):
        gate.release(Message(RecordDict({"arrays": model(number)}), reply_to=request()))
    assert [entry["event"] for entry in Ledger(tmp_path / "ledger.jsonl").entries()] == ["ran", "withheld"]


@pytest.mark.parametrize(
    ("arrays", "most", "problem"),
    [
        ({"w": torch.ones(3), "Smith": torch.ones(3)}, 1000, "an array whose name or shape is not one of the model's"),
        ({"w": torch.ones(4)}, 1000, "an array whose name or shape is not one of the model's"),
        ({"w": torch.ones(3, dtype=torch.float64)}, 145, "its arrays have more than 145 bytes"),
    ],
)
def test_only_arrays_like_the_models_leave(
    arrays: dict[str, torch.Tensor], most: int, problem: str, tmp_path: Path
) -> None:
    gate = gate_with(tmp_path, f"most_bytes = {most}\n" + APPROVED)
    gate.admit(APP)
    gate.around(lambda message, context: Message(RecordDict(), reply_to=message))(request(), context())
    gate.release(Message(RecordDict({"arrays": model()}), reply_to=request()))
    with pytest.raises(Refusal, match=problem):
        gate.release(Message(RecordDict({"arrays": to_arrays(arrays)}), reply_to=request()))


def test_configs_stay_at_the_site_but_for_the_nonce(tmp_path: Path) -> None:
    gate = gate_with(tmp_path, 'metrics = ["num-examples"]\n' + APPROVED)
    gate.admit(APP)

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        reply.content["patients"] = ConfigRecord({"names": b"Smith, Miller"})
        return reply

    reply = gate.around(app)(request(), context())
    gate.release(reply)
    assert set(reply.content) == {"arrays", "metrics", "answered"}
    assert dict(reply.content["answered"]) == {"nonce": "n-1"}
    *_, left = Ledger(tmp_path / "ledger.jsonl").entries()
    assert left["withheld"] == ["loss", "patients", "patients"]


def test_trainings_are_limited_in_time(tmp_path: Path) -> None:
    clock = Clock()
    policy = "least_seconds_between_rounds = 60\nmost_rounds_a_day = 2\n" + APPROVED
    gate = gate_with(tmp_path, policy, clock)
    for minutes in (0, 2):
        clock.now = NOON + timedelta(minutes=minutes)
        gate.admit(APP)
        gate.around(honest)(request(nonce=f"n-{minutes}"), context())
        gate.admit(APP)  # of the next task
        gate.around(honest)(request("evaluate"), context())  # does not count, and may come at once
    gate.admit(APP)
    gate.around(never)(request(nonce="n-2"), context())  # is asked again, and answered from memory
    clock.now += timedelta(seconds=30)
    gate.admit(APP)
    with pytest.raises(Refusal, match="trains at most every 60 s"):
        gate.around(never)(request(nonce="n-3"), context())
    clock.now += timedelta(minutes=5)
    gate.admit(APP)
    with pytest.raises(Refusal, match="has trained 2 times in 24 hours"):
        gate.around(never)(request(nonce="n-4"), context())
    clock.now = NOON + timedelta(days=1, seconds=1)
    gate.admit(APP)
    gate.around(honest)(request(nonce="n-5"), context())
    entries = [(each["event"], each.get("kind")) for each in Ledger(tmp_path / "ledger.jsonl").entries()]
    assert entries.count(("ran", "train")) == 3
    assert entries.count(("refused", "train")) == 2


def test_a_clock_that_is_set_back_refuses_nothing(tmp_path: Path) -> None:
    clock = Clock()
    gate = gate_with(tmp_path, "least_seconds_between_rounds = 60\n" + APPROVED, clock)
    for number, minutes in enumerate((0, -60)):
        clock.now = NOON + timedelta(minutes=minutes)
        gate.admit(APP)
        gate.around(honest)(request(nonce=f"n-{number}"), context())


def test_an_approval_that_has_expired_can_be_renewed(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = datetime(2026, 12, 2)
    gate = gate_with(tmp_path, APPROVED, clock)
    gate.admit(APP)
    with pytest.raises(Refusal, match="has expired on 2026-12-01"):
        gate.around(never)(request(), context())
    approve(tmp_path / "policy.toml", HASH, "Study 17", date(2027, 1, 1))
    gate.admit(APP)
    gate.around(honest)(request(), context())


@example(place=157, byte=0x1E)  # the end of a line becomes another of Unicode's ends of lines
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_changed_byte_of_the_ledger_is_found(
    place: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(4):
        ledger.add("ran", NOON, round=number, reason="ä\n")
    head, data = ledger.head(), bytearray(path.read_bytes())
    assert len(list(ledger.entries())) == 4
    place %= len(data)
    if data[place] == byte:
        return
    data[place] = byte
    path.write_bytes(data)
    try:
        list(ledger.entries())
        found = ledger.head() != head  # only the last line may differ without a line after it
    except ValueError:
        found = True
    assert found


def test_a_line_that_was_taken_out_is_found(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(3):
        ledger.add("ran", NOON, round=number)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    (tmp_path / "ledger.jsonl").write_text("\n".join([lines[0], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .* does not follow the line before it; it was changed"):
        list(ledger.entries())


def test_metrics_are_finite_numbers_and_arrays_leave_after_training_only(tmp_path: Path) -> None:
    gate = gate_with(tmp_path, 'metrics = ["num-examples", "a", "b", "c"]\n' + APPROVED)
    gate.admit(APP)

    def app(message: Message, context: Context) -> Message:
        numbers = {"num-examples": 10, "a": [1.0] * 100, "b": [1.0] * 101, "c": float("nan")}
        content = RecordDict({"metrics": MetricRecord(numbers)})  # type: ignore[arg-type]
        return Message(content, reply_to=message)

    reply = gate.around(app)(request("evaluate"), context())
    gate.release(reply)
    assert set(reply.content["metrics"]) == {"num-examples", "a"}
    reply = gate.around(honest)(request("evaluate"), Context(8, 5, {}, RecordDict(), {}))
    with pytest.raises(Refusal, match="only replies to training may have arrays"):
        gate.release(reply)


def test_spare_bytes_of_an_array_stay_at_the_site(tmp_path: Path) -> None:
    gate = gate_with(tmp_path, APPROVED)
    gate.admit(APP)
    gate.around(lambda message, context: Message(RecordDict(), reply_to=message))(request(), context())
    (whole,) = model().values()
    padded = whole.data.replace(b"      ", b" Smith", 1)  # in the header of the bytes
    record = ArrayRecord({"w": Array(whole.dtype, whole.shape, whole.stype, padded)})
    with pytest.raises(Refusal, match="the reply cannot be read"):
        gate.release(Message(RecordDict({"arrays": record}), reply_to=request()))


def test_a_line_that_was_cut_off_is_taken_out_and_noted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add("ran", NOON, round=1)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"at": "2026')
    ledger.add("left", NOON, round=1)
    assert [entry["event"] for entry in ledger.entries()] == ["ran", "mended", "left"]
    assert list(ledger.entries())[1]["cut"] == '{"at": "2026'
    assert "a line that was cut off" in in_words(list(ledger.entries())[1])


def test_processes_that_write_at_once_leave_the_ledger_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = f"""
from datetime import datetime; from pathlib import Path; from corymb.client.gate.ledger import Ledger
for number in range(50): Ledger(Path({str(path)!r})).add("ran", datetime(2026, 11, 28), round=number)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(list(Ledger(path).entries())) == 150
