"""Read a journal that a run may be writing at the same time."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from corymb.pages.rows import Ask, EventRow, RoundRow, Totals, VerdictRow
from corymb.server.journal.tables import DATABASE, VERSION

ANSWERS = ("replied", "failed", "late")  # events with which the wait for a site ends
MAX_CELLS = 200_000  # verdicts that are read at a time
RECENT = "rowid > (SELECT MAX(rowid) FROM events) - 400000"  # events that say how things are now


class JournalReader:
    """Reads the journal in `folder`. Every method may be called at any time, also before the first round.

    Raises `ValueError` if the journal is of another version of Corymb.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._totals, self._lock = Totals(), Lock()
        with self._open() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise ValueError(f"The journal in {folder} has tables of version {version}; this Corymb reads {VERSION}.")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(f"file:{self.folder / DATABASE}?mode=ro", uri=True)) as database:
            yield database

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._open() as database:
            try:
                return database.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):  # the run has just begun
                    return []
                raise

    def about(self) -> dict[str, str]:
        """Return what is known of the run."""
        return dict(self._rows("SELECT key, value FROM run"))

    def rounds(self, after: int = 0) -> list[RoundRow]:
        """Return the finished rounds after round `after`, in order."""
        query = "SELECT round, seconds, train, evaluate, server, notes FROM rounds WHERE round > ? ORDER BY round"
        return [
            RoundRow(number, seconds, *(json.loads(text) for text in texts))
            for number, seconds, *texts in self._rows(query, (after,))
        ]

    def last_round(self) -> int:
        """Return the number of the last finished round; 0 if there is none."""
        rows = self._rows("SELECT MAX(round) FROM rounds")
        return rows[0][0] or 0 if rows else 0

    def verdicts(self, first: int, last: int, node: str | None = None) -> list[VerdictRow]:
        """Return the verdicts of the rounds from `first` to `last`, by round, then by name; not on nodes offline.

        With `node`, only those on this node.
        """
        query = (
            "SELECT round, node, code, reason, examples, weight, metrics, bytes_down, bytes_up FROM verdicts "
            f"WHERE round BETWEEN ? AND ? {'' if node is None else 'AND node = ?'} ORDER BY round, node"
        )
        values = (first, last) if node is None else (first, last, node)
        return [
            VerdictRow(number, node, code, reason, examples, weight, json.loads(metrics), down, up)
            for number, node, code, reason, examples, weight, metrics, down, up in self._rows(query, values)
        ]

    def codes(self, first: int, last: int) -> list[tuple[int, str, str]]:
        """Return round, node and verdict of the rounds from `first` to `last`; "offline" for nodes that were."""
        found = self._rows("SELECT round, node, code FROM verdicts WHERE round BETWEEN ? AND ?", (first, last))
        offline = self._rows("SELECT round, reasons FROM offline WHERE round BETWEEN ? AND ?", (first, last))
        return found + [(number, node, "offline") for number, reasons in offline for node in json.loads(reasons)]

    def window(self, sites: int, last: int) -> int:
        """Return the first round of a window that ends with round `last` and holds at most `MAX_CELLS` verdicts."""
        return max(1, last + 1 - max(1, MAX_CELLS // max(1, sites)))

    def cells(self, first: int, last: int) -> list[tuple[int, str, str, float, float | None]]:
        """Return round, node, verdict, examples and weight of the rounds from `first` to `last`, in order."""
        query = "SELECT round, node, code, examples, weight FROM verdicts WHERE round BETWEEN ? AND ? ORDER BY round"
        return self._rows(query, (first, last))

    def reasons(self, first: int, last: int) -> dict[str, tuple[int, str, str]]:
        """Return for each node the last round in which its reply was not admitted, the verdict and the reason."""
        query = (
            "SELECT node, round, code, reason FROM verdicts WHERE round BETWEEN ? AND ? AND code != 'admitted' "
            "ORDER BY round"
        )
        return {node: (number, code, reason) for node, number, code, reason in self._rows(query, (first, last))}

    def evaluations(self, number: int) -> list[tuple[str, str, float, dict[str, float]]]:
        """Return node, verdict, examples and metrics of the clients' tests in a round."""
        rows = self._rows(
            "SELECT node, code, examples, metrics FROM evaluations WHERE round = ? ORDER BY node", (number,)
        )
        return [(node, code, examples, json.loads(metrics)) for node, code, examples, metrics in rows]

    def totals(self) -> Totals:
        """Return what the run has cost up to some round: a call reads on where the one before has ended.

        A call reads a million verdicts at most, so that no page waits for a large journal.
        """
        with self._lock:  # requests come in several threads
            return self._read_totals()

    def _read_totals(self) -> Totals:
        last = self.last_round()
        if last < self._totals.last:  # the run was resumed from an earlier round
            self._totals = Totals()
        rows = self._rows("SELECT COUNT(*) FROM verdicts WHERE round = ?", (last,))
        sites = rows[0][0] if rows else 0
        last = min(last, self._totals.last + max(1, 5 * MAX_CELLS // max(1, sites)))
        rows = self._rows(
            "SELECT code, COUNT(*), SUM(bytes_down), SUM(bytes_up) FROM verdicts WHERE round > ? AND round <= ? "
            "GROUP BY code",
            (self._totals.last, last),
        )
        for code, count, down, up in rows:
            self._totals.verdicts[code] += count
            self._totals.bytes_down += down
            self._totals.bytes_up += up
        self._totals.last = last
        return replace(self._totals, verdicts=dict(self._totals.verdicts))

    def last_event(self) -> tuple[int, float]:
        """Return the id and the Unix time of the newest event; zeros if there is none."""
        rows = self._rows("SELECT rowid, at FROM events ORDER BY rowid DESC LIMIT 1")
        return (int(rows[0][0]), float(rows[0][1])) if rows else (0, 0.0)

    def events(self, after: int = 0, most: int = 100, node: str | None = None) -> list[EventRow]:
        """Return the newest events with ids above `after`, at most `most`, oldest first; of one `node` if given."""
        query = "SELECT rowid, * FROM events WHERE rowid > ? "
        values: list[object] = [after]
        if node is not None:
            query += "AND node = ? "
            values.append(node)
        return [EventRow(*row) for row in reversed(self._rows(query + "ORDER BY rowid DESC LIMIT ?", [*values, most]))]

    def ask(self) -> Ask | None:
        """Return what was asked in the phase under way, or None between two phases."""
        rows = self._rows("SELECT round, phase, at, requests FROM asks ORDER BY at DESC LIMIT 1")
        if not rows:
            return None
        number, phase, at, requests = rows[0]
        nodes = tuple(json.loads(requests)["nodes"])
        answered = {
            node
            for (node,) in self._rows(
                f"SELECT DISTINCT node FROM events WHERE {RECENT} AND round = ? AND phase = ? AND at >= ? "
                f"AND what IN ({', '.join('?' * len(ANSWERS))})",
                (number, phase, at - 1, *ANSWERS),
            )
        }
        return Ask(number, phase, at, nodes, tuple(node for node in nodes if node not in answered))

    def answers(self, after_round: int) -> dict[str, list[tuple[int, float]]]:
        """Return for each node the round and the seconds of its answers to training since round `after_round`."""
        found: dict[str, list[tuple[int, float]]] = defaultdict(list)
        rows = self._rows(
            f"SELECT node, round, seconds FROM events WHERE {RECENT} AND round > ? AND phase = 'train' "
            "AND what = 'replied' AND seconds IS NOT NULL ORDER BY rowid",
            (after_round,),
        )
        for node, number, seconds in rows:
            found[node].append((number, seconds))
        return found

    def last_counted_at(self) -> float | None:
        """Return the Unix time at which the last round with an admitted reply ended, as far as events tell."""
        rows = self._rows(
            f"SELECT MAX(at) FROM events WHERE {RECENT} AND what = 'replied' AND round <= ?", (self.last_round(),)
        )
        return rows[0][0] if rows else None


def journals_under(folder: Path) -> list[Path]:
    """Return the folders of all journals in `folder` and below, the one written last at the end."""
    return sorted((path.parent for path in folder.glob(f"**/{DATABASE}")), key=written_at)


def written_at(folder: Path) -> float:
    """Return when a journal was written last: what is new lies in a second file until SQLite moves it.

    A reader makes this second file, too, empty.
    """
    both = (folder / DATABASE, folder / f"{DATABASE}-wal")
    states = [each.stat() for each in both if each.exists()]
    return max(state.st_mtime for state in states if state.st_size)
