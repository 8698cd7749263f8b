"""Backups of a server, made while it runs, and restored elsewhere."""

from __future__ import annotations

import sqlite3
import tarfile
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from corymb.server import Journal, RoundRecord
from corymb.server.deployment import backup as backups
from corymb.server.deployment.backup import backup, restore
from corymb.server.deployment.federation import FederationSettings
from corymb.server.deployment.provision import Federation
from corymb.server.rounds.state import Method
from corymb.strategies import FedAvg, Layout


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """The kit of a server that has run, with a database in use."""
    federation = Federation(FederationSettings(name="hearts", server="x", sites=["north"]), tmp_path / "hearts")
    federation.make_keys_here(federation.create())
    (federation.server / "var" / "log").mkdir(parents=True)
    (federation.server / "var" / "log" / "superlink.log").write_text("long")
    (federation.server / "var" / "corymb" / "runs" / "run-1").mkdir(parents=True)
    (federation.server / "var" / "corymb" / "runs" / "run-1" / "model-1.safetensors").write_bytes(b"numbers")
    return federation.server


def test_a_backup_has_all_that_a_server_needs(kit: Path, tmp_path: Path) -> None:
    archive, database = tmp_path / "a.tar.gz", kit / "var" / "state.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE nodes (name TEXT)")
        connection.execute("INSERT INTO nodes VALUES ('north')")
        connection.commit()  # it is in the write-ahead log only
        backup(kit, archive)
    assert archive.stat().st_mode & 0o777 == 0o600
    folder = tmp_path / "restored"
    assert restore(archive, folder).startswith("1.4")
    with closing(sqlite3.connect(folder / "var" / "state.db")) as connection:
        assert connection.execute("SELECT name FROM nodes").fetchall() == [("north",)]
    same = ["ca.crt", "kit.toml", "server.key", "tasks.key", "roster/north.crt"]
    same.append("var/corymb/runs/run-1/model-1.safetensors")
    assert all((folder / name).read_bytes() == (kit / name).read_bytes() for name in same)
    assert (folder / "tasks.key").stat().st_mode & 0o077 == 0
    assert not (folder / "var" / "log").exists()


def test_a_backup_has_the_newest_model_that_its_journal_names(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the backup is made, a run commits a round after each copy of the database, and deletes old models."""
    folder = kit / "var" / "corymb" / "runs" / "run-2"
    model = Layout.of({"w": torch.zeros(1)}).flatten({"w": torch.zeros(1)})
    state, rounds = Method(FedAvg()).initial(model), count(1)
    with closing(Journal(folder)) as journal:

        def commit() -> None:
            number = next(rounds)
            journal.write(RoundRecord(number), replace(state, round=number))

        commit()
        copied, left = backups._copied, iter(range(4))

        def copy_and_go_on(path: Path, copy: Path) -> Path:
            done = copied(path, copy)
            for _ in [*left][:1] if path.parent == folder else []:
                for _ in range(3):
                    commit()
            return done

        monkeypatch.setattr(backups, "_copied", copy_and_go_on)
        backup(kit, tmp_path / "a.tar.gz")
    restore(tmp_path / "a.tar.gz", tmp_path / "restored")
    with closing(Journal(tmp_path / "restored" / "var" / "corymb" / "runs" / "run-2")) as restored:
        assert restored.last_whole_round() == 4


def test_nothing_is_overwritten(kit: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    backup(kit, archive)
    with pytest.raises(FileExistsError):
        backup(kit, archive)
    with pytest.raises(ValueError, match="exists; move it away first"):
        restore(archive, kit)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(kit / "ca.crt", "ca.crt")
    with pytest.raises(ValueError, match="is not a backup that `corymb backup` has made"):
        restore(tmp_path / "b.tar.gz", tmp_path / "new")
    assert not (tmp_path / "new").exists()
