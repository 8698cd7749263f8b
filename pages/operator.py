"""What the operator's page shows of a federation: one sentence, a few numbers, alarms, and a row for each site."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import median
from typing import Any

from corymb.pages.journals import Ask, JournalReader, RoundRow
from corymb.pages.metrics import ringing
from corymb.pages.numbers import Runs, is_silent, patience, zombies
from corymb.server.rounds.codes import ADMITTED
from corymb.server.rounds.orders import Orders, read_orders

RASTER_ROUNDS = 120  # at most
CURVE_POINTS = 500  # at most
SPARK_POINTS = 20
EVENTS = 80
HOURS, MINUTES = 3600, 60
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
            "sentence": sentence(about, rounds, ask, is_active, now, orders),
            "is_active": is_active,
            "cards": _cards(journal, rounds, sites, ask),
            "curve": _curve(rounds),
            "score": _score_name(rounds),
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
        certificates = self.source.certificates()
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


def sentence(
    about: dict[str, str], rounds: list[RoundRow], ask: Ask | None, is_active: bool, now: float, orders: Orders
) -> str:
    """Return in one sentence what happens now, such as "Round 12 of 50, waiting for 3 of 14 sites"."""
    planned = about.get("rounds", "")
    of = f" of {planned}" if planned not in ("", "0") else ""
    last = rounds[-1].round if rounds else 0
    if about.get("finished"):
        return f"Finished after round {last}{of}."
    if orders.stopped_by and ask is None:
        return f"Stopped by {orders.stopped_by} after round {last}{of}."
    if not is_active:
        return f"Ended after round {last}{of}."
    if ask is None and orders.paused_by:
        return f"Paused by {orders.paused_by} after round {last}{of}."
    if ask is None:
        return f"Round {last} is finished{of and f', {of.strip()}'}."
    what = "training" if ask.phase == "train" else "evaluating"
    if not ask.waiting:
        return f"Round {ask.round}{of}: all {len(ask.asked)} sites have answered."
    text = f"Round {ask.round}{of}, {what}: waiting for {len(ask.waiting)} of {len(ask.asked)} sites"
    deadline = float(about.get("deadline", 0))
    if deadline:
        text += f", deadline {_in_words(ask.at + deadline - now)}"
    return text + "."


def _in_words(seconds: float) -> str:
    if seconds < 0:
        return "over"
    if seconds >= 2 * HOURS:
        return f"in {seconds / HOURS:.0f} h"
    return f"in {seconds / MINUTES:.0f} min" if seconds >= MINUTES else f"in {seconds:.0f} s"


def _cards(journal: JournalReader, rounds: list[RoundRow], sites: Sites, ask: Ask | None) -> list[dict[str, str]]:
    totals, cards = journal.totals(), []
    name = _score_name(rounds)
    tested = [row for row in rounds if name in row.measured]
    if tested:
        value = tested[-1].measured[name]
        cards.append({"title": name, "value": f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"})
    column = [line[-1] for line in sites.raster.values() if line]
    asked = sum(code != " " and code != "-" for code in column)
    cards.append({"title": "counted in the last round", "value": f"{column.count('+')} of {asked}"})
    if ask is not None:
        cards.append({"title": "answered now", "value": f"{len(ask.asked) - len(ask.waiting)} of {len(ask.asked)}"})
    if rounds:
        cards.append({"title": "median round", "value": f"{median(row.seconds for row in rounds[-50:]):.1f} s"})
    until = f", up to round {totals.last}" if rounds and totals.last < rounds[-1].round else ""
    cards.append({"title": f"to the sites{until}", "value": _size(totals.bytes_down)})
    cards.append({"title": f"from the sites{until}", "value": _size(totals.bytes_up)})
    return cards


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _score_name(rounds: list[RoundRow]) -> str:
    """Return the metric that the page shows: accuracy if it was measured, else loss, else the first."""
    names = list(dict.fromkeys(name for row in rounds[-50:] for name in row.measured))
    return next((name for name in ("accuracy", "loss") if name in names), names[0] if names else "")


def _curve(rounds: list[RoundRow]) -> list[tuple[int, float]]:
    name = _score_name(rounds)
    points = [(row.round, row.measured[name]) for row in rounds if isfinite(row.measured.get(name, nan))]
    step = -(-len(points) // CURVE_POINTS) or 1
    return [point for index, point in enumerate(points) if index % step == 0 or index == len(points) - 1]
