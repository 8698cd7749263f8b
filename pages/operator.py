"""What the operator's page shows of a federation: one sentence, a few numbers, alarms, and a row for each site."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from corymb.pages.journals import JournalReader
from corymb.pages.metrics import ringing
from corymb.pages.now import cards, curve, score_name, sentence
from corymb.pages.numbers import Runs, is_silent, patience, zombies
from corymb.server.rounds.codes import ADMITTED
from corymb.server.rounds.orders import read_orders

RASTER_ROUNDS = 120  # at most
SPARK_POINTS = 20
EVENTS = 80
ORDERS = ("name", "state", "seconds", "share", "examples", "certificate")


@dataclass
class Sites:
    """What a journal says about each site up to round `last`: the raster's characters, examples, weights, reasons."""

    first: int
    last: int
    raster: dict[str, str]
    examples: dict[str, float]
    shares: dict[str, float]
    reasons: dict[str, tuple[int, str, str]]
    counted: dict[str, int]  # the last round in which a site counted


@dataclass
class Operator:
    """The operator's page of `source`."""

    source: Runs
    _sites: dict[tuple[str, int], Sites] = field(default_factory=dict)

    def view(self, run: str = "", now: float | None = None) -> dict[str, Any]:
        """Return all of the page but the table of sites, for the run with this name (default: the newest)."""
        now = time.time() if now is None else now
        seen, journal = self.source.seen(), self.source.journal(run)
        numbers = self.source.numbers(now, run)
        alarms = [
            {"name": alarm.name, "severity": alarm.severity, "text": alarm.text, "who": who[:20], "more": len(who[20:])}
            for alarm, who in ringing(numbers)
        ]
        found: dict[str, Any] = {
            "at": now,
            "alarms": alarms,
            "online": sum(s["online"] for s in seen["sites"].values()),
        }
        found["enrolled"] = len(seen["sites"])
        if journal is None:
            return found | {"run": "", "sentence": "No run has begun yet.", "cards": [], "curve": [], "events": []}
        about, last, ask = journal.about(), journal.last_round(), journal.ask()
        rounds = journal.rounds()
        is_active = self._is_active(journal, seen)
        ask = ask if is_active else None
        orders = read_orders(journal.folder)
        sites = self._of(journal, last)
        return found | {
            "run": str(journal.folder.relative_to(self.source.runs)),
            "round": last,
            "sentence": sentence(about, rounds, ask, is_active, now, orders, found["online"] if seen["at"] else None),
            "is_active": is_active,
            "cards": cards(journal, rounds, sites.raster, ask),
            "curve": curve(rounds),
            "score": score_name(rounds),
            "raster": {"first": sites.first, "last": sites.last},
            "events": [vars(event) for event in journal.events(0, EVENTS)],
            "last_event": journal.last_event()[0],
        }

    def sites(
        self, run: str = "", offset: int = 0, limit: int = 200, order: str = "state", now: float | None = None
    ) -> dict[str, Any]:
        """Return rows `offset` to `offset + limit` of the table of sites, in this `order`, and how many there are.

        Raises `ValueError` for another order than those of `ORDERS`.
        """
        if order not in ORDERS:
            raise ValueError(f"The order {order!r} is unknown; use one of {', '.join(ORDERS)}.")
        now = time.time() if now is None else now
        rows = self._rows(run, now)
        descending = order in ("seconds", "share", "examples")
        rows.sort(key=lambda row: (-row[order] if descending else row[order], row["name"]))
        return {"total": len(rows), "offset": offset, "rows": rows[offset : offset + limit]}

    def site(self, name: str, run: str = "") -> dict[str, Any]:
        """Return the history of one site: its verdicts in the last rounds, and its events."""
        journal = self.source.journal(run)
        if journal is None:
            return {"name": name, "verdicts": [], "events": []}
        last = journal.last_round()
        verdicts = [vars(verdict) for verdict in journal.verdicts(max(1, last - RASTER_ROUNDS), last, name)]
        return {"name": name, "verdicts": verdicts, "events": [vars(e) for e in journal.events(0, EVENTS, name)]}

    def _rows(self, run: str, now: float) -> list[dict[str, Any]]:
        seen, journal = self.source.seen(), self.source.journal(run)
        certificates, software = self.source.certificates(), self.source.software()
        sites = self._of(journal, journal.last_round()) if journal else Sites(1, 0, {}, {}, {}, {}, {})
        answers = journal.answers(sites.first - 1) if journal else {}
        ask = journal.ask() if journal and self._is_active(journal, seen) else None
        late = set(ask.waiting) if ask and journal and now - ask.at > patience(journal) else set()
        waiting = set(ask.waiting) if ask else set()
        names = sorted({*seen["sites"], *sites.raster, *(name for name in certificates if name)})
        online = {name for name in seen["sites"] if seen["sites"][name]["online"]}
        dead = set(zombies(journal.codes(max(1, sites.last - 2), sites.last), online)) if journal else set()
        excluded = read_orders(journal.folder).excluded if journal else frozenset()
        rows = []
        for name in names:
            state = seen["sites"].get(name)
            reason = sites.reasons.get(name)
            seconds = [value for _, value in answers.get(name, [])[-SPARK_POINTS:]]
            has_problem = name in late or name in dead or (reason is not None and reason[0] == sites.last)
            rows.append({
                "name": name,
                "state": _state_of(state, has_problem, name in excluded, name in waiting),
                "since": state["since"] if state else "",
                "spark": [round(value, 2) for value in seconds],
                "seconds": median(seconds) if seconds else 0.0,
                "share": sites.shares.get(name, 0.0),
                "examples": sites.examples.get(name, 0.0),
                "counted": sites.counted.get(name, 0),
                "error": "" if reason is None else f"Round {reason[0]}: {reason[2] or reason[1]}",
                "certificate": round(certificates[name], 1) if name in certificates else 1e6,
                "software": software.get(name, ""),
                "raster": sites.raster.get(name, ""),
            })  # fmt: skip
        return rows

    def _of(self, journal: JournalReader, last: int) -> Sites:
        """Return what the journal says about each site; it is read again only after another round."""
        key = str(journal.folder), last
        if key not in self._sites:
            self._sites = {key: _sites_of(journal, last)}
        return self._sites[key]

    def _is_active(self, journal: JournalReader, seen: dict[str, Any]) -> bool:
        about = journal.about()
        if about.get("finished"):
            return False
        if not seen["at"]:  # no federation around it says whether the run still lives
            return not is_silent(journal, time.time())
        state = seen["runs"].get(about.get("flower-run", ""), "")
        return not state.startswith("finished")


def _state_of(state: Any, has_problem: bool, is_excluded: bool, is_waiting: bool) -> str:
    """Return the state of a site in words, after a number by which the table is ordered."""
    if has_problem:
        return "0 problem"
    if is_excluded:
        return "1 excluded"
    if state is None:
        return "4 unknown"
    return "1 offline" if not state["online"] else "2 working" if is_waiting else "3 online"


CODES = {ADMITTED: "+", "silent": "s", "offline": "-"}  # a reply that was rejected is "x", nothing asked is " "


def _sites_of(journal: JournalReader, last: int) -> Sites:
    population = len({node for _, node, _ in journal.codes(last, last)})
    first = max(journal.window(population, last), last + 1 - RASTER_ROUNDS)
    width = max(0, last + 1 - first)
    lines: dict[str, list[str]] = defaultdict(lambda: [" "] * width)
    examples: dict[str, float] = {}
    counted: dict[str, int] = {}
    weights: dict[str, float] = defaultdict(float)
    for number, node, code, size, weight in journal.cells(first, last):
        lines[node][number - first] = CODES.get(code, "x")
        if code == ADMITTED:
            examples[node], counted[node] = size, number
            weights[node] += weight or 0.0
    for number, node, code in journal.codes(first, last):
        if code == "offline":
            lines[node][number - first] = CODES[code]
    total = sum(weights.values()) or 1.0
    shares = {node: weight / total for node, weight in weights.items()}
    raster = {node: "".join(line) for node, line in lines.items()}
    return Sites(first, last, raster, examples, shares, journal.reasons(first, last), counted)
