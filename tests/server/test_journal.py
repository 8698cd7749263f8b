from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from corymb.server.journal import Journal, sha256
from corymb.server.record import RoundRecord, Verdict
from corymb.strategies.fedau import Attendance

STATE = {"w": torch.arange(6.0).reshape(2, 3).t(), "n": torch.tensor(3), "h": torch.ones(2).bfloat16()}


def record(number: int) -> RoundRecord:
    return RoundRecord(
        number,
        [
            Verdict("a", "offline", "a: error 3: Off."),
            Verdict("b", "admitted", "", 5, 0.5, {"loss": 1.5}),
            Verdict("c", "offline", f"c: error 3: Off for the {number}th time."),
            Verdict("d", "shape", "d: wrong."),
        ],
        train={"loss": 1.5},
        server={"accuracy": 0.25},
        seconds=0.1,
    )


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in (1, 2, 3):
        journal.write(record(number), STATE, None)
    journal.close()
    reopened = Journal(tmp_path)
    assert list(reopened.rounds()) == [record(1), record(2), record(3)]
    model = reopened.model()
    assert all(torch.equal(model[name], tensor) and model[name].dtype == tensor.dtype for name, tensor in STATE.items())
    assert reopened.model_sha256() == sha256(tmp_path / "model-000003.safetensors")
    reopened.close()


def test_a_journal_of_before_the_table_of_those_offline_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(record(1), STATE, None)
    with journal._database as database:
        database.execute("DROP TABLE offline")
        for node, reason in (("a", "a: error 3: Off."), ("c", "c: error 3: Off for the 1th time.")):
            database.execute("INSERT INTO verdicts VALUES (1, ?, 'offline', ?, 0, NULL, '{}')", (node, reason))
    journal.close()
    reopened = Journal(tmp_path)
    assert list(reopened.rounds()) == [record(1)]
    reopened.close()


def test_only_the_last_two_models_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    memory = Attendance(("a",), *(torch.ones(1) for _ in range(4)))
    for number in range(1, 6):
        journal.write(record(number), STATE, memory)
    journal.close()
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == [f"{kind}-00000{n}.safetensors" for kind in ("memory", "model") for n in (4, 5)]
    assert load_file(tmp_path / "memory-000005.safetensors").keys() == {"closed", "open", "mean", "examples"}


def test_a_round_that_was_not_committed_did_not_happen(tmp_path: Path) -> None:
    """The model of round 2 is in place and its row fails, as after a crash in between."""
    journal = Journal(tmp_path)
    journal.write(record(1), STATE, None)
    twice = record(2)
    twice.verdicts.append(twice.verdicts[1])
    with pytest.raises(Exception, match="UNIQUE"):
        journal.write(twice, {"w": torch.zeros(1)}, None)
    assert [r.round for r in journal.rounds()] == [1]
    assert torch.equal(journal.model()["w"], STATE["w"])
    journal.close()


def test_rounds_that_are_not_durable_are_committed_together(tmp_path: Path) -> None:
    journal = Journal(tmp_path, durable=False)
    for number in range(1, 5):
        journal.write(record(number), {"w": torch.full((1,), float(number))}, None)
    assert list(Journal(tmp_path, durable=False).rounds()) == []
    journal.commit()
    other = Journal(tmp_path, durable=False)
    assert [r.round for r in other.rounds()] == [1, 2, 3, 4]
    assert other.model()["w"].item() == 4
    other.close()
    journal.write(record(5), STATE, None)
    journal.close()
    reopened = Journal(tmp_path)
    assert list(reopened.rounds()) == [record(number) for number in range(1, 6)]
    assert reopened.model_sha256() == sha256(tmp_path / "model-000005.safetensors")
    reopened.close()


def test_an_empty_journal_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(LookupError, match="no round yet"):
        journal.model()
    journal.close()


def test_memory_is_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(record(1), STATE, Attendance(("a", "b"), *(torch.ones(2) for _ in range(4))))
    (text,) = journal._database.execute("SELECT memory FROM rounds").fetchone()
    journal.close()
    memory = json.loads(text)
    assert memory["nodes"] == ["a", "b"]
    assert memory["mean"] == {"$tensor": "mean"}
