"""The journal: an SQLite database of rounds, and safetensors files of the newest models and states.

A round counts as finished once it is committed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from corymb.server.journal.files import save, sha256
from corymb.server.journal.rows import insert, open_database, read_rounds
from corymb.server.rounds.record import RoundRecord
from corymb.server.rounds.state import RunState
from corymb.strategies.core.serialization import pack_memory, unpack_memory

KEPT_MODELS = 2  # files of the newest models
COMMIT_SECONDS = 1.0  # between two commits of a journal that is not durable


class Journal:
    """The journal in `folder`, which is created if it is missing.

    Use `durable=False` for simulations, which are repeated rather than resumed. The journal then commits the rounds
    of about one second together, with the state after the last of them, and does not wait until they are on the disk.
    """

    def __init__(self, folder: str | Path, durable: bool = True) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._durable = durable
        self._uncommitted: list[RoundRecord] = []  # written, but not yet committed
        self._state: RunState | None = None  # after the last of these rounds
        self._last_commit = time.monotonic()
        self._database = open_database(folder)
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        newest = "SELECT model FROM rounds WHERE model IS NOT NULL ORDER BY round DESC LIMIT ?"
        self._models = [name for (name,) in self._database.execute(newest, (KEPT_MODELS,))][::-1]

    def write(self, record: RoundRecord, state: RunState) -> None:
        """Write a finished round and the state after it. The tensors of `state` must not be changed afterwards."""
        self._uncommitted.append(record)
        self._state = state
        if self._durable or time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Commit the rounds that were written since the last commit.

        The files are complete before the row that names them is committed. So after a crash, the journal ends with
        the last committed round. All model and state files but the newest two of each are deleted.
        """
        records, self._uncommitted = self._uncommitted, []
        if not records or self._state is None:
            return
        newest = f"model-{records[-1].round:06d}.safetensors"
        model = self._state.model
        save(model.layers.restore(model), self.folder / newest, self._durable)
        plain, tensors = pack_memory(_without_model(self._state))
        if tensors:
            save(tensors, self.folder / _state_of(newest), self._durable)
        insert(self._database, records, (newest, sha256(self.folder / newest), json.dumps(plain)))
        self._models.append(newest)
        while len(self._models) > KEPT_MODELS:
            old = self._models.pop(0)
            for name in (old, _state_of(old)):
                (self.folder / name).unlink(missing_ok=True)
        self._last_commit = time.monotonic()

    def require_empty(self) -> None:
        """Raise `ValueError` if the journal already holds a run; a journal holds one run only."""
        self.commit()
        (rounds,) = self._database.execute("SELECT COUNT(*) FROM rounds").fetchone()
        if rounds:
            raise ValueError(f"The journal in {self.folder} already holds {rounds} rounds; use a new folder.")

    def rounds(self) -> Iterator[RoundRecord]:
        """Return the records of all rounds, in order."""
        self.commit()
        return iter(read_rounds(self._database))

    def model(self) -> dict[str, Tensor]:
        """Return the newest committed model. Raises `LookupError` before the first round."""
        return load_file(self.folder / self._newest("model"))

    def model_sha256(self) -> str:
        """Return the SHA-256 of the newest committed model's file. Raises `LookupError` before the first round."""
        return self._newest("model_sha256")

    def state(self, initial: RunState) -> RunState:
        """Return the newest committed state. Raises `LookupError` before the first round.

        `initial` is the state before the first round; it gives the types of the fields and the layout of the model.
        """
        plain, tensors = json.loads(self._newest("state")), self.folder / _state_of(self._newest("model"))
        restored = unpack_memory(_without_model(initial), plain, load_file(tensors) if tensors.exists() else {})
        return replace(initial, model=initial.model.layers.flatten(self.model()), **restored)

    def _newest(self, column: str) -> str:
        self.commit()
        query = f"SELECT {column} FROM rounds ORDER BY round DESC LIMIT 1"
        row = self._database.execute(query).fetchone()
        if row is None:
            raise LookupError(f"The journal in {self.folder} has no rounds yet; run at least one round first.")
        return str(row[0])

    def close(self) -> None:
        """Commit the written rounds and close the database."""
        try:
            self.commit()
        finally:
            self._database.close()


def _without_model(state: RunState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in fields(state) if field.name != "model"}


def _state_of(model: str) -> str:
    return model.replace("model-", "state-")
