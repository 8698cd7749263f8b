"""The numbers that describe a federation now, read from its server's kit: what metrics, alarms and the page share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from cryptography.x509 import Certificate

from corymb.pages.journals import JournalReader, journals_under, written_at
from corymb.pages.machine import available_bytes, clock_error, free_bytes, server_processes
from corymb.protocol.certificates import days_left, read_certificate
from corymb.server.deployment.federation import ServerKit, read_kit
from corymb.server.deployment.provision import ROSTER
from corymb.server.deployment.status import SITES, active_runs, software_of_sites
from corymb.server.rounds.codes import ADMITTED, BELOW_QUORUM, SILENT
from corymb.server.rounds.orders import Orders, read_orders

DAY = 86400.0  # seconds
OVERDUE_FACTOR, OVERDUE_SECONDS = 3.0, 60.0  # an answer is overdue after three median times, at least a minute
ZOMBIE_ROUNDS = 3  # rounds in a row without an answer of a site that is online
NOT_BEGUN = ("pending", "starting")  # Flower's words for a run whose ServerApp does not yet run
GRACE = 60.0  # seconds after a deadline, or after a run was started, until it counts as stalled


@dataclass(frozen=True)
class Number:
    """The value of a metric, with its labels."""

    metric: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


@dataclass
class Runs:
    """The journals in `folder`, without a federation around them."""

    folder: Path
    _readers: dict[Path, JournalReader] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """The folder of the journals."""
        return self.folder

    def seen(self) -> dict[str, Any]:
        """Return what is known of the sites and of the runs under way: nothing."""
        return {"at": "", "sites": {}, "runs": {}}

    def certificates(self) -> dict[str, float]:
        """Return for how many days certificates are valid: there are none."""
        return {}

    def software(self) -> dict[str, str]:
        """Return what sites run: that is not known."""
        return {}

    def numbers(self, now: float, run: str = "") -> list[Number]:
        """Return the numbers of a run, by default the newest."""
        journal = self.journal(run)
        return list(_of_run(journal, set(), now, False)) if journal else []

    def journal(self, name: str = "") -> JournalReader | None:
        """Return the reader of the journal with this name below `runs`, or of the one written last, or None."""
        for folder in reversed(journals_under(self.runs)):
            if not name or str(folder.relative_to(self.runs)) == name:
                with suppress(ValueError):  # of another version of Corymb
                    return self.reader(folder)
        return None

    def reader(self, folder: Path) -> JournalReader:
        """Return the reader of the journal in `folder`, the same one in every call."""
        if folder not in self._readers:
            self._readers[folder] = JournalReader(folder)
        return self._readers[folder]


@dataclass
class Federation(Runs):
    """The federation whose server's kit lies in `folder`; `parent` is the process id of `corymb serve`.

    Without it, nothing is said of the server's processes.
    """

    parent: int | None = None

    @property
    def kit(self) -> ServerKit:
        """The settings of the kit."""
        kit = read_kit(self.folder)
        if not isinstance(kit, ServerKit):
            raise ValueError(f"{self.folder} is the kit of a site; give that of a server.")
        return kit

    @property
    def runs(self) -> Path:
        """The folder of the journals."""
        return self.folder / "var" / "corymb" / "runs"

    def seen(self) -> dict[str, Any]:
        """Return what the monitor saw last; without sites and runs if it has seen nothing yet."""
        with suppress(OSError, ValueError):
            seen: dict[str, Any] = json.loads((self.folder / "var" / SITES).read_text())
            return seen
        return {"at": "", "sites": {}, "runs": {}}

    def journal(self, name: str = "") -> JournalReader | None:
        """Return the reader of the journal with this name, or of the run under way, or of the one written last."""
        active = active_runs(self.folder)
        for folder in reversed(journals_under(self.runs)) if active and not name else ():
            with suppress(ValueError):
                if (reader := self.reader(folder)).about().get("flower-run") in active:
                    return reader
        return super().journal(name)

    def orders(self) -> Orders:
        """Return the orders to the run under way; none if there is no run with a journal."""
        journal = self.journal()
        is_active = journal is not None and journal.about().get("flower-run") in active_runs(self.folder)
        return read_orders(journal.folder) if journal is not None and is_active else Orders()

    def software(self) -> dict[str, str]:
        """Return the versions of Corymb and Flower at the sites that have said so."""
        return software_of_sites(self.folder)

    def numbers(self, now: float, run: str = "") -> list[Number]:
        """See `numbers`."""
        return numbers(self, now, run)

    def certificates(self) -> dict[str, float]:
        """Return for how many days the certificate of each site is valid, and that of the server, under ""."""
        found: dict[str, float] = {}
        for path in [*(self.folder / ROSTER).glob("*.crt"), self.folder / "server.crt"]:
            with suppress(OSError, ValueError):  # one that is being written
                name = "" if path.parent == self.folder else path.stem
                found[name] = days_left(_certificate(path, path.stat().st_mtime_ns))
        return found


@lru_cache(maxsize=20_000)
def _certificate(path: Path, version: int) -> Certificate:
    """Return the certificate in a file; `version` is the time when it was written."""
    return read_certificate(path)


def age(text: str, now: float) -> float:
    """Return how many seconds ago the ISO time `text` was; infinity for none."""
    return now - datetime.fromisoformat(text).timestamp() if text else float("inf")


def numbers(federation: Federation, now: float | None = None, run: str = "") -> list[Number]:
    """Return all numbers at the Unix time `now` (default: the machine's), of a run (default: the newest)."""
    now = time.time() if now is None else now
    seen = federation.seen()
    found = list(_machine(federation))
    found += [Number("corymb_monitor_age_seconds", min(age(seen["at"], now), 1e9))]
    certificates = federation.certificates()
    for name, days in certificates.items():
        metric = "corymb_site_certificate_seconds" if name else "corymb_server_certificate_seconds"
        found.append(Number(metric, DAY * days, (("site", name),) if name else ()))
    online = {name for name, site in seen["sites"].items() if site["online"]}
    found.append(Number("corymb_sites_online", len(online)))
    found.append(Number("corymb_sites_enrolled", sum(bool(name) for name in certificates)))
    found += [Number("corymb_site_online", float(name in online), (("site", name),)) for name in seen["sites"]]
    active = {run_id: state for run_id, state in seen["runs"].items() if not state.startswith("finished")}
    found.append(Number("corymb_run_active", float(bool(active))))
    journal = federation.journal(run)
    is_stalled = any(state.startswith(NOT_BEGUN) for state in active.values()) and age(seen["runs_since"], now) > GRACE
    if journal is not None:
        is_running = journal.about().get("flower-run", "") in active  # an app of others may keep no journal
        found += _of_run(journal, online, now, is_running)
        is_paused = bool(read_orders(journal.folder).paused_by)
        found.append(Number("corymb_run_paused", float(is_running and is_paused)))
        is_stalled |= is_running and not is_paused and is_silent(journal, now)
    found.append(Number("corymb_stalled", float(is_stalled)))
    return found


def _machine(federation: Federation) -> Iterator[Number]:
    yield Number("corymb_disk_free_bytes", free_bytes(federation.folder))
    yield Number("corymb_memory_available_bytes", available_bytes())
    error = clock_error()
    yield Number("corymb_clock_synchronised", float(error is not None))
    yield Number("corymb_clock_error_seconds", error or 0.0)
    processes = {} if federation.parent is None else server_processes(federation.parent)
    for name, (is_running, size) in processes.items():
        if name == "edge" and not federation.kit.edge:
            continue
        yield Number("corymb_process_up", float(is_running), (("process", name),))
        yield Number("corymb_process_memory_bytes", size, (("process", name),))


def _of_run(journal: JournalReader, online: set[str], now: float, is_running: bool) -> Iterator[Number]:
    about, totals, last = journal.about(), journal.totals(), journal.last_round()
    planned, quorum = int(about.get("rounds", 0)), int(about.get("quorum", 0))
    needed = quorum if last else max(quorum, int(about.get("sites-to-begin", 0)))
    yield Number("corymb_round", last)
    yield Number("corymb_rounds_left", max(0, planned - last))
    yield Number("corymb_quorum", quorum)
    yield Number("corymb_sites_missing", max(0, needed - len(online)) if is_running else 0)
    for code, count in sorted(totals.verdicts.items()):
        yield Number("corymb_replies_total", count, (("verdict", code),))
    for way, size in (("down", totals.bytes_down), ("up", totals.bytes_up)):
        yield Number("corymb_bytes_total", size, (("direction", way),))
    rounds = journal.rounds(last - 1) if last else []
    yield Number("corymb_round_seconds", rounds[-1].seconds if rounds else 0.0)
    yield Number("corymb_round_abandoned", float(bool(rounds) and BELOW_QUORUM in rounds[-1].notes))
    for name, value in sorted(rounds[-1].measured.items()) if rounds else ():
        yield Number("corymb_score", value, (("metric", name),))
    codes = journal.codes(max(1, last + 1 - ZOMBIE_ROUNDS), last)
    bad = {node for number, node, code in codes if number == last and code not in (ADMITTED, SILENT, "offline")}
    yield Number("corymb_replies_rejected", len(bad))
    yield Number("corymb_zombies", len(zombies(codes, online)))
    ask = journal.ask() if is_running else None
    yield Number("corymb_replies_overdue", len(ask.waiting) if ask and now - ask.at > patience(journal) else 0)
    counted = journal.last_counted_at()
    yield Number("corymb_seconds_since_counted_round", max(0.0, now - counted) if counted else 0.0)


def zombies(codes: list[tuple[int, str, str]], online: set[str]) -> list[str]:
    """Return the sites that are online, and were asked and silent in each of the last rounds of `codes`."""
    silent = [node for _, node, code in codes if code == SILENT]
    return sorted(node for node in online if silent.count(node) >= ZOMBIE_ROUNDS)


def patience(journal: JournalReader) -> float:
    """Return after how many seconds an answer is overdue: three median times of recent answers, at least a minute."""
    seconds = [value for answers in journal.answers(journal.last_round() - 10).values() for _, value in answers]
    return max(OVERDUE_SECONDS, OVERDUE_FACTOR * median(seconds)) if seconds else OVERDUE_SECONDS


def is_silent(journal: JournalReader, now: float) -> bool:
    """Return whether nothing has happened for longer than the deadline of a phase allows."""
    deadline = float(journal.about().get("deadline", 0))
    _, at = journal.last_event()
    at = max(at, written_at(journal.folder))
    return now - at > deadline + GRACE
