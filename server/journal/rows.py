"""The tables of the journal's database, and the conversion between round records and rows."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from operator import attrgetter
from pathlib import Path

from corymb.server.journal.tables import DATABASE, VERSION
from corymb.server.rounds.record import RoundRecord, Verdict
from corymb.server.rounds.rejections import Code

_BYTES = "; ".join(f"ALTER TABLE verdicts ADD COLUMN bytes_{way} INTEGER NOT NULL DEFAULT 0" for way in ("down", "up"))
# From each older version that is read.
MIGRATIONS = {2: f"ALTER TABLE rounds ADD COLUMN state_sha256 TEXT; {_BYTES}", 3: _BYTES, 4: _BYTES}
SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY,
    seconds REAL NOT NULL,
    train TEXT NOT NULL,
    evaluate TEXT NOT NULL,
    server TEXT NOT NULL,
    notes TEXT NOT NULL,
    model TEXT,
    model_sha256 TEXT,
    state TEXT,
    state_sha256 TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS run (  -- what the run is, and its best model
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdicts (
    round INTEGER NOT NULL REFERENCES rounds,
    node TEXT NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    examples REAL NOT NULL,
    weight REAL,
    metrics TEXT NOT NULL,
    bytes_down INTEGER NOT NULL DEFAULT 0,
    bytes_up INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (round, node)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluations (
    round INTEGER NOT NULL REFERENCES rounds,
    node TEXT NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    examples REAL NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (round, node)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS offline (  -- not in verdicts: there may be many, and each has a reason only
    round INTEGER PRIMARY KEY REFERENCES rounds,
    reasons TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS asks (  -- what was asked in the round under way
    round INTEGER NOT NULL,
    phase TEXT NOT NULL,
    run_id TEXT NOT NULL,  -- of Flower: too large for an INTEGER
    nonce TEXT NOT NULL,
    at REAL NOT NULL,  -- Unix time
    requests TEXT NOT NULL,
    PRIMARY KEY (round, phase)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (  -- what happened, as it happened
    at REAL NOT NULL,  -- Unix time
    round INTEGER NOT NULL,
    phase TEXT NOT NULL,
    node TEXT NOT NULL,
    what TEXT NOT NULL,
    seconds REAL,  -- since the request
    bytes INTEGER NOT NULL,
    detail TEXT NOT NULL
) STRICT;
"""
JSON_COLUMNS = ("train", "evaluate", "server", "notes")


def open_database(folder: Path) -> sqlite3.Connection:
    """Open the database in `folder`, and create its tables if there are none.

    Raises `ValueError` if another version of Corymb made them.
    """
    # A ServerApp may create the journal in one thread and use it in another, but never in two at a time.
    database = sqlite3.connect(folder / DATABASE, check_same_thread=False)
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if tables and version != VERSION and version not in MIGRATIONS:
        database.close()
        raise ValueError(
            f"The journal in {folder} has tables of version {version}, and this Corymb reads version {VERSION}; use "
            "the Corymb that wrote it, or a new folder."
        )
    database.execute("PRAGMA journal_mode = WAL")
    if version != VERSION:  # in one transaction, so that a crash leaves all tables or none
        migration = MIGRATIONS.get(version, "")
        database.executescript(f"BEGIN; {migration}; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
    return database


def insert(
    database: sqlite3.Connection, records: Sequence[RoundRecord], newest: tuple[str, str, str, str | None]
) -> None:
    """Insert `records` in one transaction.

    `newest` is the name of the model file, its SHA-256, the state as JSON, and the SHA-256 of the file of the state's
    tensors, if there is one; all after the last of `records`.
    """
    with database:
        database.executemany(
            "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    r.round, r.seconds, *(json.dumps(dict(getattr(r, name))) for name in JSON_COLUMNS),
                    *(newest if r is records[-1] else (None,) * 4),
                )
                for r in records
            ],
        )  # fmt: skip
        database.executemany(
            "INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_row(r.round, v) for r in records for v in r.verdicts if v.code != Code.OFFLINE],
        )
        database.executemany(
            "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
            [
                (r.round, v.node, v.code, v.reason, v.examples, json.dumps(dict(v.metrics)))
                for r in records
                for v in r.evaluations
            ],
        )
        database.executemany("INSERT INTO offline VALUES (?, ?)", [(r.round, _offline(r)) for r in records])


def delete_after(database: sqlite3.Connection, number: int) -> None:
    """Delete the rounds with numbers above `number`."""
    with database:
        for table in ("rounds", "verdicts", "evaluations", "offline"):
            database.execute(f"DELETE FROM {table} WHERE round > ?", (number,))


def committed(folder: Path, after: int) -> list[RoundRecord]:
    """Return the rounds with numbers above `after` that another process has committed to the journal in `folder`.

    Returns an empty list if the database does not exist yet or is locked.
    """
    address = f"{(folder / DATABASE).resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            return read_rounds(database, after)
    except sqlite3.OperationalError:
        return []


def read_rounds(database: sqlite3.Connection, after: int = 0) -> list[RoundRecord]:
    """Return the rounds with numbers above `after`, in order.

    All tables are read in one transaction, so that every round has its verdicts.
    """
    database.execute("BEGIN")
    try:
        verdicts: dict[int, list[Verdict]] = defaultdict(list)
        for number, *row in database.execute("SELECT * FROM verdicts WHERE round > ?", (after,)):
            verdicts[number].append(_verdict(*row))
        evaluations: dict[int, list[Verdict]] = defaultdict(list)
        for number, node, code, reason, examples, metrics in database.execute(
            "SELECT * FROM evaluations WHERE round > ? ORDER BY round, node", (after,)
        ):
            evaluations[number].append(_verdict(node, code, reason, examples, None, metrics))
        offline: dict[tuple[str, str], Verdict] = {}  # shared, because the same nodes are offline in many rounds
        for number, reasons in database.execute("SELECT * FROM offline WHERE round > ?", (after,)):
            for pair in json.loads(reasons).items():
                if pair not in offline:
                    offline[pair] = Verdict(pair[0], Code.OFFLINE, pair[1])
                verdicts[number].append(offline[pair])
        rounds = database.execute(
            f"SELECT round, seconds, {', '.join(JSON_COLUMNS)} FROM rounds WHERE round > ? ORDER BY round", (after,)
        )
        return [
            RoundRecord(
                number,
                tuple(sorted(verdicts[number], key=attrgetter("node"))),
                tuple(evaluations[number]),
                **dict(zip(JSON_COLUMNS, map(json.loads, metrics), strict=True)),
                seconds=seconds,
            )
            for number, seconds, *metrics in rounds
        ]
    finally:
        database.execute("ROLLBACK")


def _row(number: int, verdict: Verdict) -> tuple[object, ...]:
    v, metrics = verdict, json.dumps(dict(verdict.metrics))
    return number, v.node, v.code, v.reason, v.examples, v.weight, metrics, v.bytes_down, v.bytes_up


def _verdict(
    node: str, code: str, reason: str, examples: float, weight: float | None, metrics: str, down: int = 0, up: int = 0
) -> Verdict:
    whole = int(examples) if examples == int(examples) else examples
    return Verdict(node, code, reason, whole, weight, json.loads(metrics), down, up)


def _offline(record: RoundRecord) -> str:
    return json.dumps({verdict.node: verdict.reason for verdict in record.verdicts if verdict.code == Code.OFFLINE})
