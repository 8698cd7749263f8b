"""Where a round's time goes in `corymb simulate`: a sample of the server's stack every millisecond, by part.

`engine` is training as the server sees it: its own work for it, and waiting for workers. The rest is what lies between
a bare kernel and a federation with messages, rule, door, verdicts and journal.

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

from corymb.server import FlowerStrategy, RoundRecord
from corymb.simulations.campaign import run_all
from corymb.simulations.experiment import read

SECONDS = 0.001
WARMUP = 2  # rounds
PARTS = {
    "engine": ("simulations/engine/",),
    "messages": ("simulations/grid", "protocol/flower", "protocol/block", "server/arrivals", "server/roster"),
    "codec": ("protocol/codec", "strategies/layout"),
    "door": ("server/door",),
    "fold": ("strategies/",),
    "journal": ("server/journal", "server/record"),
    "tests": ("simulations/federation", "client/"),
    "other": ("server/strategy",),
}


def part_of(frame: FrameType | None) -> str:
    """The part that the innermost frame of ours belongs to."""
    while frame is not None:
        _, ours, place = frame.f_code.co_filename.rpartition("/corymb/")
        if ours:
            for part, places in PARTS.items():
                if place.startswith(places):
                    return part
        frame = frame.f_back
    return "other"


def shares(file: Path) -> dict[str, float]:
    """The share of each part in the rounds of an experiment, after the first few."""
    samples: Counter[str] = Counter()
    finish = FlowerStrategy._finish

    def finished(strategy: FlowerStrategy, record: RoundRecord, num_rounds: int) -> None:
        finish(strategy, record, num_rounds)
        if record.round == WARMUP:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
        if record.round == num_rounds:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def sample(number: int, frame: FrameType | None) -> None:
        samples[part_of(frame)] += 1

    signal.signal(signal.SIGALRM, sample)
    FlowerStrategy._finish = finished  # type: ignore[method-assign, assignment]
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        list(run_all([(read(file), Path(folder))], Console(quiet=True)))
    return {part: samples[part] / max(1, samples.total()) for part in PARTS}


def main() -> None:
    found = shares(Path(sys.argv[1]))
    print(", ".join(f"{part} {100 * share:.0f} %" for part, share in found.items()))


if __name__ == "__main__":
    main()
