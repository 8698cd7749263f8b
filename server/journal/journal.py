"""The journal: SQLite for what a round tells, safetensors for what it ends with. A round exists once it is there."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from corymb.server.journal.files import save, sha256
from corymb.server.journal.rows import DATABASE, SCHEMA, insert, read_rounds
from corymb.server.rounds.record import RoundRecord
from corymb.server.rounds.state import RunState
from corymb.strategies.core.serialization import packed, unpacked

KEPT = 2  # models of the newest rounds
TOGETHER = 1.0  # seconds whose rounds a journal that is not durable commits at once


class Journal:
    """The journal in `folder`, made when missing.

    `durable=False` is for simulations, which are repeated rather than resumed: the rounds of a second are committed
    together, with the state after the last of them, and the operating system decides when they reach the disk.
    """

    def __init__(self, folder: Path, durable: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._durable = durable
        self._waiting: list[RoundRecord] = []  # rounds that are not committed yet, and what the last one ended with
        self._state: RunState | None = None
        self._committed = time.monotonic()
        # A ServerApp may open it in one thread and run its rounds in another; never two at a time.
        self._database = sqlite3.connect(folder / DATABASE, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._database.executescript(SCHEMA)
        newest = "SELECT model FROM rounds WHERE model IS NOT NULL ORDER BY round DESC LIMIT ?"
        self._models = [name for (name,) in self._database.execute(newest, (KEPT,))][::-1]

    def write(self, record: RoundRecord, state: RunState) -> None:
        """Write a finished round with the state after it, whose tensors nobody may change."""
        self._waiting.append(record)
        self._state = state
        if self._durable or time.monotonic() - self._committed > TOGETHER:
            self.commit()

    def commit(self) -> None:
        """Commit the rounds that were written since the last time.

        The files are in place before the row that names them is committed, so a crash leaves the
        journal at the rounds before. Models older than the last two are removed.
        """
        records, self._waiting = self._waiting, []
        if not records or self._state is None:
            return
        newest = f"model-{records[-1].round:06d}.safetensors"
        model = self._state.model
        save(model.layers.restore(model), self.folder / newest, self._durable)
        plain, tensors = packed(_without_model(self._state))
        if tensors:
            save(tensors, self.folder / _state_of(newest), self._durable)
        insert(self._database, records, (newest, sha256(self.folder / newest), json.dumps(plain)))
        self._models.append(newest)
        while len(self._models) > KEPT:
            old = self._models.pop(0)
            for name in (old, _state_of(old)):
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
        return iter(read_rounds(self._database))

    def model(self) -> dict[str, Tensor]:
        """The newest committed model. Raises `LookupError` before the first round."""
        return load_file(self.folder / self._newest("model"))

    def model_sha256(self) -> str:
        """The SHA-256 of the newest committed model's file."""
        return self._newest("model_sha256")

    def state(self, initial: RunState) -> RunState:
        """The newest committed state. `initial` is that before the first round: it has the types and the layout.

        Raises `LookupError` before the first round.
        """
        plain, tensors = json.loads(self._newest("state")), self.folder / _state_of(self._newest("model"))
        kept = unpacked(_without_model(initial), plain, load_file(tensors) if tensors.exists() else {})
        return replace(initial, model=initial.model.layers.flatten(self.model()), **kept)

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


def _without_model(state: RunState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in fields(state) if field.name != "model"}


def _state_of(model: str) -> str:
    return model.replace("model-", "state-")
