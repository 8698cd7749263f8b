"""What a run does now: a sentence, a few numbers and the curve of its score."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from statistics import median

from corymb.pages.journals import JournalReader
from corymb.pages.rows import Ask, RoundRow
from corymb.server.rounds.orders import Orders
from corymb.server.rounds.run_failed import FAILED

CURVE_POINTS = 500  # at most
HOURS, MINUTES = 3600, 60


def sentence(
    about: dict[str, str],
    rounds: list[RoundRow],
    ask: Ask | None,
    is_active: bool,
    now: float,
    orders: Orders,
    online: int | None = None,
) -> str:
    """Return in one sentence what happens now, such as "Round 12 of 50, waiting for 3 of 14 sites"."""
    planned = about.get("rounds", "")
    of = f" of {planned}" if planned not in ("", "0") else ""
    last = rounds[-1].round if rounds else 0
    if reason := about.get(FAILED):
        return f"Failed after round {last}{of}. {reason}"
    if about.get("finished"):
        return f"Finished after round {last}{of}."
    if orders.stopped_by and ask is None:
        return f"Stopped by {orders.stopped_by} after round {last}{of}."
    if not is_active:
        return f"Ended after round {last}{of}."
    if not last and ask is None and online is not None and online < int(about.get("sites-to-begin", 0)):
        return f"Waiting for {about['sites-to-begin']} sites to begin; {online} are online."
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


def cards(
    journal: JournalReader, rounds: list[RoundRow], raster: Mapping[str, str], ask: Ask | None
) -> list[dict[str, str]]:
    """Return the numbers beside the sentence, each with a title; `raster` has a character for each site and round."""
    totals, found = journal.totals(), []
    name = score_name(rounds)
    tested = [row for row in rounds if name in row.measured]
    if tested:
        value = tested[-1].measured[name]
        found.append({"title": name, "value": f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"})
    column = [line[-1] for line in raster.values() if line]
    asked = sum(code != " " and code != "-" for code in column)
    found.append({"title": "counted in the last round", "value": f"{column.count('+')} of {asked}"})
    if ask is not None:
        found.append({"title": "answered now", "value": f"{len(ask.asked) - len(ask.waiting)} of {len(ask.asked)}"})
    if rounds:
        found.append({"title": "median round", "value": f"{median(row.seconds for row in rounds[-50:]):.1f} s"})
    until = f", up to round {totals.last}" if rounds and totals.last < rounds[-1].round else ""
    found.append({"title": f"to the sites{until}", "value": _size(totals.bytes_down)})
    found.append({"title": f"from the sites{until}", "value": _size(totals.bytes_up)})
    return found


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def score_name(rounds: list[RoundRow]) -> str:
    """Return the metric that the page shows: accuracy if it was measured, else loss, else the first."""
    names = list(dict.fromkeys(name for row in rounds[-50:] for name in row.measured))
    return next((name for name in ("accuracy", "loss") if name in names), names[0] if names else "")


def curve(rounds: list[RoundRow]) -> list[tuple[int, float]]:
    """Return rounds with the score after each, few enough to be drawn."""
    name = score_name(rounds)
    points = [(row.round, row.measured[name]) for row in rounds if isfinite(row.measured.get(name, nan))]
    step = -(-len(points) // CURVE_POINTS) or 1
    return [point for index, point in enumerate(points) if index % step == 0 or index == len(points) - 1]
