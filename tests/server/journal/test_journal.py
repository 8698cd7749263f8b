from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from corymb.server.journal import Journal
from corymb.server.journal.files import sha256
from corymb.server.journal.models import export_model, stored_runs, unfinished_run
from corymb.server.rounds.backup_workers import Estimates, Gradients
from corymb.server.rounds.record import RoundRecord, Verdict
from corymb.server.rounds.round_journal import write_or_keep
from corymb.server.rounds.state import Cost, RunState
from corymb.strategies import Layout
from corymb.strategies.core.serialization import pack_memory
from corymb.strategies.core.server_optimizer import OptimizerState
from corymb.strategies.participation.fedau import Attendance

STATE = {"w": torch.arange(6.0).reshape(2, 3).t(), "n": torch.tensor(3), "h": torch.ones(2).bfloat16()}


def state(model: Mapping[str, Tensor] = STATE, memory: object = None) -> RunState:
    return RunState(Layout.of(model).flatten(model), memory)


def record(number: int) -> RoundRecord:
    return RoundRecord(
        number,
        (
            Verdict("a", "offline", "a: error 3: Off."),
            Verdict("b", "admitted", "", 5, 0.5, {"loss": 1.5}),
            Verdict("c", "offline", f"c: error 3: Off for the {number}th time."),
            Verdict("d", "shape", "d: wrong."),
        ),
        train={"loss": 1.5},
        server={"accuracy": 0.25},
        seconds=0.1,
    )


def test_written_rounds_are_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in (1, 2, 3):
        journal.write(record(number), state())
    journal.close()
    reopened = Journal(tmp_path)
    assert list(reopened.rounds()) == [record(1), record(2), record(3)]
    model = reopened.model()
    assert all(torch.equal(model[name], tensor) and model[name].dtype == tensor.dtype for name, tensor in STATE.items())
    assert reopened.model_sha256() == sha256(tmp_path / "model-000003.safetensors")
    reopened.close()


def test_only_the_last_two_models_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    memory = Attendance(("a",), *(torch.ones(1) for _ in range(4)))
    for number in range(1, 6):
        journal.write(record(number), state(memory=memory))
    journal.close()
    names = sorted(path.name for path in tmp_path.glob("*-*.safetensors"))
    assert names == [f"{kind}-00000{n}.safetensors" for kind in ("model", "state") for n in (4, 5)]
    tensors = load_file(tmp_path / "state-000005.safetensors")
    assert tensors.keys() == {
        f"memory.{name}" for name in ("closed_intervals", "current_interval", "mean_interval", "examples")
    }


def test_a_round_that_was_not_committed_is_lost_as_a_whole(tmp_path: Path) -> None:
    """The model file of round 2 is written, but the insertion of its row fails, as after a crash in between."""
    journal = Journal(tmp_path)
    journal.write(record(1), state())
    invalid = record(2)
    invalid = replace(invalid, verdicts=(*invalid.verdicts, invalid.verdicts[1]))
    with pytest.raises(Exception, match="UNIQUE"):
        journal.write(invalid, state({"w": torch.zeros(1)}))
    assert [r.round for r in journal.rounds()] == [1]
    assert torch.equal(journal.model()["w"], STATE["w"])
    journal.close()


def test_rounds_that_are_not_durable_are_committed_together(tmp_path: Path) -> None:
    journal = Journal(tmp_path, durable=False)
    for number in range(1, 5):
        journal.write(record(number), state({"w": torch.full((1,), float(number))}))
    assert list(Journal(tmp_path, durable=False).rounds()) == []
    journal.commit()
    other = Journal(tmp_path, durable=False)
    assert [r.round for r in other.rounds()] == [1, 2, 3, 4]
    assert other.model()["w"].item() == 4
    other.close()
    journal.write(record(5), state())
    journal.close()
    reopened = Journal(tmp_path)
    assert list(reopened.rounds()) == [record(number) for number in range(1, 6)]
    assert reopened.model_sha256() == sha256(tmp_path / "model-000005.safetensors")
    reopened.close()


def test_the_journal_names_the_rounds_after_which_a_run_can_be_resumed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, durable=False)
    named = [journal.resumable]
    for number in range(1, 7):
        journal.write(record(number), replace(state(), round=number))
        if number in (2, 3, 6):
            journal.commit()
        named.append(journal.resumable)
    journal.close()
    assert named == [(), (), (2,), (3, 2), (3, 2), (3, 2), (6, 3)]
    for number in named[-1]:
        with closing(Journal(tmp_path)) as reopened:
            assert reopened.resume(state()).round == number
            assert reopened.resumable[0] == number
        (tmp_path / f"model-{number:06d}.safetensors").unlink()


def test_the_best_of_rounds_that_are_committed_together_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, durable=False)
    for number, accuracy in enumerate((0.5, 0.9, 0.7), start=1):
        after = state({"w": torch.full((1,), float(number))})
        journal.write(replace(record(number), server={"accuracy": accuracy}), after)
    journal.close()
    assert load_file(tmp_path / "best.safetensors")["w"].item() == 2
    with closing(Journal(tmp_path)) as reopened:
        assert reopened.about()["best-round"] == "2"


def test_an_empty_journal_raises_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(LookupError, match="no rounds yet"):
        journal.model()
    journal.close()


def test_a_state_is_stored_as_json_and_tensors_and_restored(tmp_path: Path) -> None:
    """Including memories, moments, the estimates of the round-size policy, the known nodes and the cost."""
    attendance = Attendance(("a", "b"), *(torch.rand(2) for _ in range(4)))
    estimates = Estimates(Gradients(0.5, 2.0), 3, (0.1,), (1.5, 2.5), (2, 1), 2, 0.7)
    written = replace(
        state(memory=attendance),
        moments=OptimizerState({"step": torch.tensor(2.0), "exp_avg": torch.rand(8)}),
        candidate_memories=(None, attendance),
        round_size=estimates,
        known_nodes=frozenset({"b", "a", "c"}),
        cost=Cost(9, 7),
        round=4,
    )
    journal = Journal(tmp_path)
    journal.write(record(4), written)
    (text,) = journal._database.execute("SELECT state FROM rounds").fetchone()
    plain = json.loads(text)
    assert plain["memory"]["nodes"] == ["a", "b"]
    assert plain["memory"]["mean_interval"] == {"$tensor": "memory.mean_interval"}
    assert plain["known_nodes"] == ["a", "b", "c"]
    first = replace(
        state({name: torch.zeros_like(tensor) for name, tensor in STATE.items()}, Attendance()),
        moments=OptimizerState(),
        candidate_memories=(None, Attendance()),
        round_size=Estimates(),
    )
    restored = journal.state(first)
    journal.close()
    assert restored.round_size == estimates
    assert (restored.known_nodes, restored.cost, restored.round) == (written.known_nodes, written.cost, 4)
    assert torch.equal(restored.model.parameters, written.model.parameters)
    assert packed_equal(restored, written)


def packed_equal(one: RunState, two: RunState) -> bool:
    (plain, tensors), (plain_2, tensors_2) = (pack_memory(replace(each, model=None)) for each in (one, two))  # type: ignore[arg-type]
    return bool(plain == plain_2) and all(torch.equal(tensors[name], tensors_2[name]) for name in tensors | tensors_2)


def scored(number: int, accuracy: float) -> RoundRecord:
    return replace(record(number), server={"accuracy": accuracy})


def test_the_best_and_every_nth_model_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_every=3)
    for number, accuracy in enumerate([0.1, 0.6, 0.3, 0.6, 0.2, 0.4, 0.1, 0.1], 1):
        journal.write(scored(number, accuracy), state({"w": torch.full((1,), float(number))}))
    assert journal.about() == {"best-score": "0.6", "best-round": "2"}
    journal.close()
    assert load_file(tmp_path / "best.safetensors")["w"].item() == 2
    assert sorted(p.name for p in tmp_path.glob("model-*")) == [f"model-00000{n}.safetensors" for n in (3, 6, 7, 8)]


def test_a_damaged_file_falls_back_to_the_round_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte in the newest model, or a torn file of the newest memory. The later round is forgotten."""
    for damage in ("model", "state"):
        folder = tmp_path / damage
        journal = Journal(folder)
        memory = Attendance(("a",), *(torch.ones(1) for _ in range(4)))
        for number in (1, 2, 3):
            journal.write(record(number), replace(state({"w": torch.full((1,), float(number))}, memory), round=number))
        path = folder / f"{damage}-000003.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content if damage == "model" else content[:-5])
        initial = state({"w": torch.zeros(1)}, Attendance())
        with pytest.raises(ValueError, match="is damaged"):
            journal.state(initial)
        resumed = journal.resume(initial)
        assert (resumed.round, resumed.model.parameters.tolist()) == (2, [2.0])
        assert journal.about()["best-round"] == "1"
        assert [r.round for r in journal.rounds()] == [1, 2]
        journal.write(record(3), replace(resumed, round=3))
        assert [r.round for r in journal.rounds()] == [1, 2, 3]
        journal.close()


def test_a_journal_of_version_2_is_migrated(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    memory = Attendance(("a",), *(torch.ones(1) for _ in range(4)))
    journal.write(record(1), replace(state(memory=memory), round=1))
    journal.close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        database.execute("ALTER TABLE rounds DROP COLUMN state_sha256")
        database.execute("DROP TABLE run")
        for column in ("bytes_down", "bytes_up"):
            database.execute(f"ALTER TABLE verdicts DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 2")
    migrated = Journal(tmp_path)
    resumed = migrated.resume(state(memory=Attendance()))
    assert (resumed.round, resumed.memory.nodes) == (1, ("a",))
    assert list(migrated.rounds()) == [record(1)]
    migrated.close()


def test_a_full_disk_keeps_rounds_in_memory(tmp_path: Path) -> None:
    """A quota of the database stands for the full disk: sqlite reports it as it reports a full disk."""
    journal = Journal(tmp_path)
    journal.write(record(1), replace(state(), round=1))
    pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
    journal._database.execute(f"PRAGMA max_page_count = {pages}")
    large = replace(record(2), train={f"metric-{n}": float(n) for n in range(5000)})
    with pytest.raises(sqlite3.OperationalError, match="full"):
        journal.write(large, replace(state(), round=2))
    write_or_keep(journal, replace(record(3)), replace(state(), round=3))
    journal._database.execute("PRAGMA max_page_count = 100000")
    write_or_keep(journal, replace(record(4)), replace(state(), round=4))
    assert [r.round for r in journal.rounds()] == [1, 2, 3, 4]
    assert journal.resume(state()).round == 4
    journal.close()


def test_a_model_is_listed_and_exported_with_its_origin(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run-7")
    journal.begin({"rule": "FedAU()"}, resume=False)
    for number, accuracy in ((1, 0.9), (2, 0.4)):
        journal.write(scored(number, accuracy), state({"w": torch.full((1,), float(number))}))
    journal.close()
    (run,) = stored_runs(tmp_path)
    assert (run.folder.name, run.rule, run.rounds, run.best_round, run.best_score) == ("run-7", "FedAU()", 2, 1, 0.9)
    for best, number in ((False, 2), (True, 1)):
        out = tmp_path / f"{number}.safetensors"
        export_model(run.folder, out, best)
        assert load_file(out)["w"].item() == number
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert metadata["round"] == str(number)
        assert metadata["rule"] == "FedAU()"
        assert json.loads(metadata["admitted-rounds-by-site"]) == {"b": number}
    with pytest.raises(ValueError, match="There is no journal in"):
        export_model(tmp_path / "nowhere", tmp_path / "x")


LOCKER = """
import sys, time
from corymb.server.journal import Journal
journal = Journal(sys.argv[1])
journal.begin({"rule": "FedAvg"}, resume=False)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_server_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LOCKER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        journal = Journal(tmp_path)
        with pytest.raises(ValueError, match="Another process is writing to the journal"):
            journal.begin({}, resume=True)
        other.kill()
        other.wait()
        journal.begin({"rule": "FedAvg"}, resume=True)
        journal.write(record(1), replace(state(), round=1))
        with pytest.raises(ValueError, match="is of a run with rule = FedAvg, not FedAU"):
            journal.begin({"rule": "FedAU"}, resume=True)
        journal.close()


def test_a_refused_run_leaves_no_note(tmp_path: Path) -> None:
    """Else a restart of the refused run would take the journal of another run for its own."""
    journal = Journal(tmp_path, notes={"flower-run": "1"})
    journal.begin({"rule": "FedAvg"}, resume=False)
    journal.write(record(1), replace(state(), round=1))
    journal.close()
    other = Journal(tmp_path, notes={"flower-run": "2"})
    with pytest.raises(ValueError, match="already holds 1 rounds"):
        other.begin({"rule": "FedAvg"}, resume=False)
    assert other.about()["flower-run"] == "1"
    other.close()


def test_the_best_round_is_forgotten_with_its_round(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number, accuracy in ((1, 0.2), (2, 0.9)):
        journal.write(scored(number, accuracy), replace(state({"w": torch.full((1,), float(number))}), round=number))
    (tmp_path / "model-000002.safetensors").write_bytes(b"torn")
    assert journal.resume(state({"w": torch.zeros(1)})).round == 1
    assert "best-round" not in journal.about()
    journal.close()


def test_the_last_run_of_an_app_that_is_not_complete_is_found(tmp_path: Path) -> None:
    for name, app, is_complete in (("a", "quickstart", False), ("b", "quickstart", True), ("c", "other", False)):
        journal = Journal(tmp_path / name, notes={"app": app})
        journal.begin({}, resume=False)
        if is_complete:
            journal.finish()
        journal.close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "journal.sqlite").write_text("this is no database")
    (tmp_path / "old").mkdir()
    with sqlite3.connect(tmp_path / "old" / "journal.sqlite") as database:
        database.execute("CREATE TABLE rounds (round INTEGER PRIMARY KEY)")
    assert unfinished_run(tmp_path, "quickstart") == tmp_path / "a"
    assert unfinished_run(tmp_path, "nobody's") is None
