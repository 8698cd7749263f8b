"""Orders of operators to a run under way. The file of orders is also their record: who ordered what, and when."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

FILE = "orders.jsonl"  # in the journal's folder
ACTIONS = ("pause", "resume", "stop", "exclude", "include")  # the last two name a site


@dataclass(frozen=True)
class Order:
    """An order of the user `by`, at the Unix time `at`; `site` is empty unless the action names one."""

    action: str
    site: str
    by: str
    at: float


@dataclass(frozen=True)
class Orders:
    """What all orders so far mean: who has paused the run or wants it to stop, and which sites are not asked."""

    all: tuple[Order, ...] = ()
    paused_by: str = ""
    stopped_by: str = ""
    excluded: frozenset[str] = frozenset()


def read_orders(folder: Path) -> Orders:
    """Return the orders to the run whose journal lies in `folder`. A line that was cut off does not count."""
    path = folder / FILE
    found: list[Order] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Order(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    paused, stopped, excluded = "", "", set[str]()
    for order in found:
        if order.action == "pause":
            paused = order.by
        elif order.action == "resume":
            paused = stopped = ""
        elif order.action == "stop":
            stopped = order.by
        elif order.action == "exclude":
            excluded.add(order.site)
        else:
            excluded.discard(order.site)
    return Orders(tuple(found), paused, stopped, frozenset(excluded))


def release(folder: Path) -> None:
    """Let a new run go on with the journal in `folder`, if the run before was paused or stopped."""
    orders = read_orders(folder)
    if orders.paused_by or orders.stopped_by:
        add_order(folder, "resume", "the next run")


def add_order(folder: Path, action: str, by: str, site: str = "") -> None:
    """Add an order, and return once it is on the disk.

    Raises `ValueError` for an unknown action, and if a site is missing or not wanted.
    """
    if action not in ACTIONS:
        raise ValueError(f"The action {action!r} is unknown; use one of {', '.join(ACTIONS)}.")
    if (action in ("exclude", "include")) != bool(site):
        raise ValueError(f"{action} {'takes no site' if site else 'needs the name of a site'}.")
    with (folder / FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"action": action, "site": site, "by": by, "at": time.time()}) + "\n")
        file.flush()
        os.fsync(file.fileno())
