"""Measure the operator's page: 10,000 sites and 1,000 rounds, and an update with 100 sites; and its first paint.

    python benchmarks/pages.py [--sites 10000] [--rounds 1000]

It writes a journal with one verdict for each site and round, and asks the application for what the page asks for.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

from corymb.pages.numbers import Runs
from corymb.pages.operator import Operator
from corymb.server import Journal

PORT = 8499
ROUND = "INSERT INTO rounds VALUES (?, 12.5, '{}', '{}', ?, '{}', NULL, NULL, NULL, NULL)"
OPEN_BAR, UPDATE_BAR, PAINT_BAR = 5.0, 0.2, 1.0  # seconds


def write_journal(folder: Path, sites: int, rounds: int) -> None:
    """Write a journal in which every site counts in nearly every round, with events of the last rounds."""
    Journal(folder).close()
    with closing(sqlite3.connect(folder / "journal.sqlite")) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.executemany("INSERT INTO run VALUES (?, ?)", [("rounds", str(rounds)), ("deadline", "600")])
        for number in range(1, rounds + 1):
            server = json.dumps({"accuracy": 1 - 1 / (number + 1)})
            database.execute(ROUND, (number, server))
            database.executemany(
                "INSERT INTO verdicts VALUES (?, ?, ?, '', 100, 0.0001, '{}', 4000, 4000)",
                ((number, f"site-{k:05d}", "silent" if (k + number) % 50 == 0 else "admitted") for k in range(sites)),
            )
            if number > rounds - 20:
                database.executemany(
                    "INSERT INTO events VALUES (?, ?, 'train', ?, 'replied', 3.5, 4000, '')",
                    ((1.79e9 + number, number, f"site-{k:05d}") for k in range(sites)),
                )
            if number % 50 == 0:
                database.commit()
        database.commit()


def add_round(folder: Path, number: int, sites: int) -> None:
    with closing(sqlite3.connect(folder / "journal.sqlite")) as database:
        database.execute(ROUND, (number, '{"accuracy": 1}'))
        database.executemany(
            "INSERT INTO verdicts VALUES (?, ?, 'admitted', '', 100, 0.01, '{}', 4000, 4000)",
            ((number, f"site-{k:05d}") for k in range(sites)),
        )
        database.commit()


def ask(operator: Operator) -> float:
    """Return the seconds for what the page asks for: its state, and the first rows of the table."""
    started = time.perf_counter()
    json.dumps(operator.view())
    json.dumps(operator.sites(limit=100))
    return time.perf_counter() - started


def first_paint(folder: Path) -> float:
    """Return the seconds until Chromium has painted the page for the first time, the server being up."""
    command = [sys.executable, "-m", "corymb.cli", "dashboard", str(folder), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urlopen(f"http://127.0.0.1:{PORT}/").close()
                break
            except URLError:
                time.sleep(0.2)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page()
            times = []
            for _ in range(5):
                page.goto(f"http://127.0.0.1:{PORT}/")
                page.wait_for_selector("#rows button")
                paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
                times.append(page.evaluate(paint) / 1000)
            browser.close()
            return float(sorted(times)[2])
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        large, small = Path(name) / "large", Path(name) / "small"
        write_journal(large / "run-1", options.sites, options.rounds)
        write_journal(small / "run-1", 100, 100)
        opened = ask(Operator(Runs(large)))
        operator = Operator(Runs(small))
        ask(operator)
        updates = []
        for number in range(101, 112):
            add_round(small / "run-1", number, 100)
            updates.append(ask(operator))
        paint = first_paint(small)
    update = sorted(updates)[5]
    print(f"opening {options.sites} sites and {options.rounds} rounds: {opened:.2f} s (bar {OPEN_BAR:g} s)")
    print(f"an update with 100 sites: {1000 * update:.0f} ms (bar {1000 * UPDATE_BAR:.0f} ms)")
    print(f"first paint with 100 sites: {paint:.2f} s (bar {PAINT_BAR:g} s)")
    sys.exit(opened > OPEN_BAR or update > UPDATE_BAR or paint > PAINT_BAR)


if __name__ == "__main__":
    main()
