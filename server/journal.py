"""The journal: the one record of a run, in SQLite and safetensors. A round exists once it is committed here."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from operator import attrgetter
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from corymb.server.door import Code
from corymb.server.record import RoundRecord, Verdict
from corymb.strategies.memory import packed

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY,
    seconds REAL NOT NULL,
    train TEXT NOT NULL,
    evaluate TEXT NOT NULL,
    server TEXT NOT NULL,
    rule TEXT NOT NULL,
    model TEXT,
    model_sha256 TEXT,
    memory TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS verdicts (
    round INTEGER NOT NULL REFERENCES rounds,
    node TEXT NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    examples INTEGER NOT NULL,
    weight REAL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (round, node)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS offline (  -- instead of verdicts: there may be many, and they say nothing else
    round INTEGER PRIMARY KEY REFERENCES rounds,
    reasons TEXT NOT NULL
) STRICT;
"""
MEASURED = ("train", "evaluate", "server", "rule")
KEPT = 2  # models of the newest rounds
TOGETHER = 1.0  # seconds whose rounds a journal that is not durable commits at once


class Journal:
    """The journal in `folder`, made when missing.

    `durable=False` is for simulations, which are repeated rather than resumed: the rounds of a second are committed
    together, with the model of the last of them, and the operating system decides when they reach the disk.
    """

    def __init__(self, folder: Path, durable: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._durable = durable
        self._waiting: list[RoundRecord] = []  # rounds that are not committed yet, and what the last one ended with
        self._state: Mapping[str, Tensor] = {}
        self._memory: object = None
        self._committed = time.monotonic()
        # A ServerApp may open it in one thread and run its rounds in another; never two at a time.
        self._database = sqlite3.connect(folder / "journal.sqlite", check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._database.executescript(SCHEMA)
        newest = "SELECT model FROM rounds WHERE model IS NOT NULL ORDER BY round DESC LIMIT ?"
        self._models = [name for (name,) in self._database.execute(newest, (KEPT,))][::-1]

    def write(self, record: RoundRecord, state: Mapping[str, Tensor], memory: object) -> None:
        """Write a finished round with the model, and the memory of rule and step, after it: nobody may change them."""
        self._waiting.append(record)
        self._state, self._memory = state, memory
        if self._durable or time.monotonic() - self._committed > TOGETHER:
            self.commit()

    def commit(self) -> None:
        """Commit the rounds that were written since the last time.

        The files are in place before the row that names them is committed, so a crash leaves the
        journal at the rounds before. Models older than the last two are removed.
        """
        records, self._waiting = self._waiting, []
        if not records:
            return
        newest = f"model-{records[-1].round:06d}.safetensors"
        self._save(dict(self._state), newest)
        plain, tensors = packed(self._memory)
        if tensors:
            self._save(tensors, _memory_of(newest))
        kept = (newest, sha256(self.folder / newest), json.dumps(plain))
        with self._database as database:
            database.executemany(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        r.round, r.seconds, *(json.dumps(getattr(r, name)) for name in MEASURED),
                        *(kept if r is records[-1] else (None, None, None)),
                    )
                    for r in records
                ],
            )  # fmt: skip
            database.executemany(
                "INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?)",
                [_row(r.round, v) for r in records for v in r.verdicts if v.code != Code.OFFLINE],
            )
            database.executemany("INSERT INTO offline VALUES (?, ?)", [(r.round, _offline(r)) for r in records])
        self._models.append(newest)
        while len(self._models) > KEPT:
            model = self._models.pop(0)
            for name in (model, _memory_of(model)):
                (self.folder / name).unlink(missing_ok=True)
        self._committed = time.monotonic()

    def require_empty(self) -> None:
        """Raise `ValueError` if a run has been written here: two runs in one journal would be neither."""
        self.commit()
        (rounds,) = self._database.execute("SELECT COUNT(*) FROM rounds").fetchone()
        if rounds:
            raise ValueError(f"The journal in {self.folder} already holds {rounds} rounds; give a folder of its own.")

    def rounds(self) -> Iterator[RoundRecord]:
        """Every round, in order."""
        self.commit()
        return iter(_rounds(self._database, 0))

    def model(self) -> dict[str, Tensor]:
        """The newest committed model. Raises `LookupError` before the first round."""
        return load_file(self.folder / self._newest("model"))

    def model_sha256(self) -> str:
        """The SHA-256 of the newest committed model's file."""
        return self._newest("model_sha256")

    def _newest(self, column: str) -> str:
        self.commit()
        query = f"SELECT {column} FROM rounds ORDER BY round DESC LIMIT 1"
        row = self._database.execute(query).fetchone()
        if row is None:
            raise LookupError(f"The journal in {self.folder} has no round yet; run one first.")
        return str(row[0])

    def close(self) -> None:
        """Close the database; what was written stays."""
        try:
            self.commit()
        finally:
            self._database.close()

    def _save(self, tensors: dict[str, Tensor], name: str) -> None:
        """Write `name` whole or not at all."""
        draft = self.folder / f"{name}.draft"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft)
        if self._durable:
            _sync(draft)
        draft.replace(self.folder / name)
        if self._durable:
            _sync(self.folder)


def committed(folder: Path, after: int) -> list[RoundRecord]:
    """The rounds after that number which another process has committed in `folder` by now; none while it is busy."""
    address = f"{(folder / 'journal.sqlite').resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            return _rounds(database, after)
    except sqlite3.OperationalError:
        return []


def _rounds(database: sqlite3.Connection, after: int) -> list[RoundRecord]:
    """Read in one transaction, so that no round comes without its verdicts."""
    database.execute("BEGIN")
    try:
        verdicts: dict[int, list[Verdict]] = defaultdict(list)
        for number, *row in database.execute("SELECT * FROM verdicts WHERE round > ?", (after,)):
            verdicts[number].append(_verdict(*row))
        seen: dict[tuple[str, str], Verdict] = {}  # who is offline is so again and again
        for number, reasons in database.execute("SELECT * FROM offline WHERE round > ?", (after,)):
            for pair in json.loads(reasons).items():
                if pair not in seen:
                    seen[pair] = Verdict(pair[0], Code.OFFLINE, pair[1])
                verdicts[number].append(seen[pair])
        rounds = database.execute(
            f"SELECT round, seconds, {', '.join(MEASURED)} FROM rounds WHERE round > ? ORDER BY round", (after,)
        )
        return [
            RoundRecord(
                number,
                sorted(verdicts[number], key=attrgetter("node")),
                **dict(zip(MEASURED, map(json.loads, metrics), strict=True)),
                seconds=seconds,
            )
            for number, seconds, *metrics in rounds
        ]
    finally:
        database.execute("ROLLBACK")


def _memory_of(model: str) -> str:
    return model.replace("model-", "memory-")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _row(number: int, verdict: Verdict) -> tuple[object, ...]:
    metrics = json.dumps(verdict.metrics)
    return number, verdict.node, verdict.code, verdict.reason, verdict.examples, verdict.weight, metrics


def _verdict(node: str, code: str, reason: str, examples: int, weight: float | None, metrics: str) -> Verdict:
    return Verdict(node, code, reason, examples, weight, json.loads(metrics))


def _offline(record: RoundRecord) -> str:
    return json.dumps({verdict.node: verdict.reason for verdict in record.verdicts if verdict.code == Code.OFFLINE})
