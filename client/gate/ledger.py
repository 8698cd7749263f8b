"""The site's ledger: what ran on its data, what left, and when. Each line has the hash of the line before it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

FIRST = "0" * 64


class Ledger:
    """The file `path`, one JSON object per line. Several processes may write to it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, event: str, at: datetime, **details: Any) -> None:
        """Add an entry, and return once it is on the disk. Other processes that add one wait."""
        with self._path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            data = self._path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):  # a line was cut off, as by a power cut
                file.truncate(len(whole))
                self._write(file, "mended", at, {"cut": data[len(whole) :].decode(errors="replace")})
            self._write(file, event, at, details)

    def _write(self, file: TextIO, event: str, at: datetime, details: dict[str, Any]) -> None:
        entry = {"at": at.isoformat(timespec="seconds"), "event": event, **details, "before": self.head()}
        file.write(json.dumps(entry, ensure_ascii=True) + "\n")
        file.flush()
        os.fsync(file.fileno())

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield all entries. Raises `ValueError`, which names the line, if one was changed, added or taken out."""
        before = FIRST
        for number, line in enumerate(self._lines(), start=1):
            try:
                entry = json.loads(line)
                is_next = isinstance(entry, dict) and entry.get("before") == before
            except ValueError:
                is_next = False
            if not is_next:
                raise ValueError(f"Line {number} of {self._path} does not follow the line before it; it was changed.")
            yield entry
            before = _hash(line)

    def head(self) -> str:
        """Return the hash of the last line. Keep it elsewhere, to notice if the end of the ledger is cut off."""
        lines = self._lines()
        return _hash(lines[-1]) if lines else FIRST

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        *lines, rest = self._path.read_bytes().decode(errors="replace").split("\n")  # at no other kind of line end
        return [*lines, rest] if rest else lines


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def in_words(entry: dict[str, Any]) -> str:
    """Return an entry of a ledger as a line."""
    if entry["event"] == "mended":
        return f"{entry['at']} mended   a line that was cut off, as by a power cut"
    task = f"round {entry['round']} of run {entry['run']}" if "run" in entry else f"app {entry['app'][:12]}"
    purpose = f", {entry['purpose']}" if "purpose" in entry else ""
    what = entry.get("reason") or entry.get("error") or ""
    if "bytes" in entry:
        metrics = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in entry["metrics"].items()
        )
        withheld = f"; withheld: {', '.join(entry['withheld'])}" if entry["withheld"] else ""
        what = f"{entry['arrays']} arrays, {entry['bytes']} bytes; {metrics}{withheld}"
    detail = f": {what}" if what else ""
    line = f"{entry['at']} {entry['event']:8} {entry.get('kind', ''):8} {task}{purpose}{detail}"
    return "".join(c if c.isprintable() else "?" for c in line)  # some of it comes from apps
