"""The journal: an SQLite database of rounds, and safetensors files of models and states.

A round counts as finished once it is committed.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from corymb.server.journal.asks import Asks
from corymb.server.journal.files import FileLock, save, sha256
from corymb.server.journal.rows import delete_after, insert, open_database, read_rounds
from corymb.server.rounds.record import RoundRecord, score_of
from corymb.server.rounds.run_failed import FAILED
from corymb.server.rounds.state import RunState
from corymb.strategies import Model
from corymb.strategies.core.serialization import pack_memory, unpack_memory

log = logging.getLogger("flwr.corymb")
KEPT_MODELS = 2  # files of the newest models
BEST, FINISHED = "best.safetensors", "finished"  # a file, and what `about` has of a run that is complete
_Saved = tuple[int, str, str, str | None]  # round, model file, its SHA-256, and that of the state's tensors


class Journal:
    """The journal in `folder`, which is created if it is missing.

    It keeps the newest two models, the best one as `best.safetensors`, and the model of every `keep_every`-th round
    (0: none). The best model is the one with the highest accuracy at the server's test or the clients' evaluation, or
    with the lowest loss if there is no accuracy.

    `notes` are stored with a run that begins, and may change when it is resumed; `about` returns them.

    Use `durable=False` for simulations, which can be repeated. The journal then commits the rounds of a second
    together, with the state after the last of them, and does not wait until they are on the disk.
    """

    def __init__(
        self, folder: str | Path, durable: bool = True, keep_every: int = 0, notes: Mapping[str, str] | None = None
    ) -> None:  # fmt: skip
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._durable, self._keep_every, self._notes = folder, durable, keep_every, notes or {}
        self._uncommitted: list[RoundRecord] = []  # written, but not yet committed
        self._state: RunState | None = None  # after the last of these rounds
        self._best: tuple[float, int, Model] | None = None  # the best of them, if a new best: score, round, model
        self._commit_seconds = 0.0 if durable else 1.0
        self._next_commit = time.monotonic() + self._commit_seconds
        self.resumable: tuple[int, ...] = ()  # see `RoundJournal`
        self._lock = FileLock(folder / "writer.lock")
        self._database = open_database(folder)
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self.asks = Asks(folder, self._database) if durable else None

    def begin(self, about: Mapping[str, str], resume: bool) -> None:
        """Prepare the journal for writing a run that `about` describes.

        With `resume`, the journal may hold rounds of the same run. Raises `ValueError` if it holds rounds otherwise, or
        if another process is writing to it.
        """
        self._lock.take(f"Another process is writing to the journal in {self.folder}; use another folder.")
        self.commit()
        (rounds,) = self._database.execute("SELECT COUNT(*) FROM rounds").fetchone()
        stored = dict(self._database.execute("SELECT key, value FROM run"))
        if rounds and not resume:
            raise ValueError(
                f"The journal in {self.folder} already holds {rounds} rounds; use a new folder, or resume the run."
            )
        for key, value in about.items():
            if rounds and stored.get(key, value) != value:
                raise ValueError(
                    f"The journal in {self.folder} is of a run with {key} = {stored[key]}, not {value}; use "
                    "another folder."
                )
        with self._database:
            self._database.execute("DELETE FROM run WHERE key IN (?, ?)", (FINISHED, FAILED))
        self.note({**about, **self._notes})

    def resume(self, initial: RunState) -> RunState:
        """Return the state to go on from: the newest one whose files are whole, or `initial` if there is none.

        Rounds after that state are deleted from the journal. `initial` is the state before the first round.
        """
        number = self.last_whole_round()
        delete_after(self._database, number)
        if self.asks is not None:
            self.asks.forget(number + 1, after=True)
        if int(self.about().get("best-round", 0)) > number:  # that round is forgotten
            with self._database:
                self._database.execute("DELETE FROM run WHERE key IN ('best-round', 'best-score')")
        self.resumable = tuple(number for number, *_ in self._saved()[:KEPT_MODELS])
        return self.state(initial) if number else initial

    def last_whole_round(self) -> int:
        """Return the number of the newest round whose state was saved in files that are whole; 0 if there is none."""
        self.commit()
        for number, model, digest, state_digest in self._saved():
            try:
                self._check(model, digest, state_digest)
            except (OSError, ValueError) as error:
                log.warning("The state after round %d cannot be read (%s); an older one is used.", number, error)
            else:
                return number
        return 0

    def write(self, record: RoundRecord, state: RunState) -> None:
        """Write a finished round and the state after it. The tensors of `state` must not be changed afterwards.

        Raises `OSError` or `sqlite3.OperationalError` if that is not possible now. The journal then keeps the round in
        memory, and the next `write` or `commit` tries again.
        """
        self._uncommitted.append(record)
        self._state = state
        score = score_of(record)
        if score is not None and score > self._best_score():
            self._best = score, record.round, state.model
        if time.monotonic() >= self._next_commit:
            self.commit()

    def commit(self) -> None:
        """Commit the rounds that were written since the last commit. Raises as `write` does.

        The files are complete before the row that names them is committed. So after a crash, the journal ends with
        the last committed round. Files of models that need not be kept are deleted afterwards.
        """
        records = self._uncommitted
        if not records or self._state is None:
            return
        newest = f"model-{records[-1].round:06d}.safetensors"
        model = self._state.model
        save(model.layers.restore(model), self.folder / newest, self._durable)
        plain, tensors = pack_memory(_without_model(self._state))
        digest = None
        if tensors:
            save(tensors, self.folder / _state_of(newest), self._durable)
            digest = sha256(self.folder / _state_of(newest))
        model_digest = sha256(self.folder / newest)
        try:
            insert(self._database, records, (newest, model_digest, json.dumps(plain), digest))
        except sqlite3.OperationalError:  # the disk is full, or the database is locked
            raise
        except Exception:
            self._uncommitted = []  # trying again would fail again
            raise
        self._uncommitted = []
        self._next_commit = time.monotonic() + self._commit_seconds
        if self.asks is not None:
            self.asks.forget(records[-1].round)
        self._keep_best()
        saved = self._saved()
        self.resumable = tuple(number for number, *_ in saved[:KEPT_MODELS])
        for number, name, *_ in saved[KEPT_MODELS:]:
            if not (self._keep_every and number % self._keep_every == 0):
                for file in (name, _state_of(name)):
                    (self.folder / file).unlink(missing_ok=True)

    def finish(self) -> None:
        """Commit the last rounds and note that the run is complete. Raises as `write` does."""
        self.commit()
        self.note({FINISHED: "yes"})

    def rounds(self) -> Iterator[RoundRecord]:
        """Return the records of all rounds, in order."""
        self.commit()
        return iter(read_rounds(self._database))

    def about(self) -> dict[str, str]:
        """Return what is known of the run: what `begin` was given, and the round and score of the best model."""
        return dict(self._database.execute("SELECT key, value FROM run"))

    def model(self) -> dict[str, Tensor]:
        """Return the newest committed model. Raises `LookupError` before the first round."""
        return load_file(self.folder / self._newest("model"))

    def model_sha256(self) -> str:
        """Return the SHA-256 of the newest committed model's file. Raises `LookupError` before the first round."""
        return str(self._newest("model_sha256"))

    def state(self, initial: RunState) -> RunState:
        """Return the newest committed state. Raises `LookupError` before the first round.

        `initial` is the state before the first round; it gives the types of the fields and the layout of the model.
        Raises `ValueError` if a file is damaged.
        """
        model, digest, state, state_digest = map(self._newest, ("model", "model_sha256", "state", "state_sha256"))
        self._check(model, digest, state_digest)
        path = self.folder / _state_of(model)  # a journal of version 2 has the file without its SHA-256
        tensors = load_file(path) if path.exists() else {}
        restored = unpack_memory(_without_model(initial), json.loads(state), tensors)
        return replace(initial, model=initial.model.layers.flatten(self.model()), **restored)

    def close(self) -> None:
        """Commit the written rounds and close the database."""
        try:
            self.commit()
        finally:
            self._database.close()
            self._lock.release()

    def _saved(self) -> list[_Saved]:
        """Return the saved rounds, newest first. The files of older ones may be deleted by now."""
        saved = "SELECT round, model, model_sha256, state_sha256 FROM rounds WHERE model IS NOT NULL"
        return list(self._database.execute(f"{saved} ORDER BY round DESC LIMIT 64"))

    def _check(self, model: str, digest: str, state_digest: str | None) -> None:
        """Raise `ValueError` if a file of a saved round does not have its SHA-256."""
        files = {model: digest} | ({_state_of(model): state_digest} if state_digest else {})
        for name, expected in files.items():
            if sha256(self.folder / name) != expected:
                raise ValueError(f"the file {name} is damaged")

    def _best_score(self) -> float:
        return self._best[0] if self._best else float(self.about().get("best-score", "-inf"))

    def _keep_best(self) -> None:
        """Keep the best model of the rounds that were committed, if it is the best so far."""
        if self._best is not None:
            (score, number, model), self._best = self._best, None
            save(model.layers.restore(model), self.folder / BEST, self._durable)
            self.note({"best-score": repr(score), "best-round": str(number)})

    def note(self, entries: Mapping[str, str]) -> None:
        """Store `entries` in what `about` returns."""
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO run VALUES (?, ?)", entries.items())

    def _newest(self, column: str) -> Any:
        self.commit()
        row = self._database.execute(f"SELECT {column} FROM rounds ORDER BY round DESC LIMIT 1").fetchone()
        if row is None:
            raise LookupError(f"The journal in {self.folder} has no rounds yet; run at least one round first.")
        return row[0]


def _without_model(state: RunState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in fields(state) if field.name != "model"}


def _state_of(model: str) -> str:
    return model.replace("model-", "state-")
