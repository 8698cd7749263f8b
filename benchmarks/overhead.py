"""Measure how `corymb simulate` spends a round's time, by sampling the server process's stack every millisecond.

`engine` is the server process's share of training: its own work and the time it waits for workers. The other parts
are the overhead of a federation with messages, rule, door, verdicts and journal.

    python benchmarks/overhead.py EXPERIMENT.toml
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType

from rich.console import Console

from corymb.server.rounds.round_loop import RoundLoop
from corymb.simulations.experiments.reader import read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.runner import run_all

SECONDS = 0.001  # between samples
WARMUP = 2  # rounds
PARTS = {
    "engine": ("simulations/engine/",),
    "messages": (
        "simulations/grid",
        "protocol/flower",
        "protocol/row_arrays",
        "server/rounds/arrivals",
        "server/rounds/requests",
        "server/rounds/roster",
    ),
    "codec": ("protocol/codec", "strategies/core/layout"),
    "door": ("server/rounds/door", "server/rounds/array_checks"),
    "rule": ("strategies/",),
    "journal": ("server/journal", "server/rounds/record"),
    "tests": ("simulations/results/run.py", "client/"),
    "other": ("server/",),
}


def part_of(frame: FrameType | None) -> str:
    """Return the part of the innermost frame that belongs to Corymb."""
    while frame is not None:
        _, is_corymb, path = frame.f_code.co_filename.rpartition("/corymb/")
        if is_corymb:
            for part, prefixes in PARTS.items():
                if path.startswith(prefixes):
                    return part
        frame = frame.f_back
    return "other"


def shares(file: Path) -> dict[str, float]:
    """Return the share of each part in the time of an experiment's rounds, without the first few."""
    samples: Counter[str] = Counter()
    finish = RoundLoop._finish

    def finish_and_sample(strategy: RoundLoop, num_rounds: int) -> None:
        finish(strategy, num_rounds)
        if strategy.record.round == WARMUP:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
        if strategy.record.round == num_rounds:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def sample(number: int, frame: FrameType | None) -> None:
        samples[part_of(frame)] += 1

    signal.signal(signal.SIGALRM, sample)
    RoundLoop._finish = finish_and_sample  # type: ignore[method-assign, assignment]
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        list(run_all([(resolve(read(file)), Path(folder))], Console(quiet=True)))
    return {part: samples[part] / max(1, samples.total()) for part in PARTS}


def main() -> None:
    part_shares = shares(Path(sys.argv[1]))
    print(", ".join(f"{part} {100 * share:.0f} %" for part, share in part_shares.items()))


if __name__ == "__main__":
    main()
