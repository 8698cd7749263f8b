"""Do memory and time depend on how many clients there are, or only on how many take part?

Softmax regression on 28x28 images, 1,000 clients a round out of 1,000 and out of 100,000; all 100,000 in one round; and
clients of lognormal sizes beside clients of equal ones. Each client draws from a memory-mapped store of 60,000 images.
Memory is what the process and its workers hold together, pages that they share counted once (PSS).

    python benchmarks/population.py [--rounds 6]
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

CORYMB = Path(sys.executable).with_name("corymb")


class Measured(NamedTuple):
    """Seconds of each round, the steps in it, and the largest memory in the first and in the second half, in GB."""

    seconds: list[float]
    steps: float
    early: float
    late: float

    @property
    def median(self) -> float:
        """Of the rounds after the first."""
        return statistics.median(self.seconds[1:] or self.seconds)


def store(folder: Path) -> None:
    """Images of noise, as bytes."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 60_000), ("test", 1_000)):
        np.save(folder / f"x_{name}.npy", rng.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8))
        np.save(folder / f"y_{name}.npy", rng.integers(0, 10, count))


def memory(process: int) -> float:
    """PSS of a process and its children, in GB."""
    total = 0.0
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for one in (process, *map(int, children)):
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e6
    return total


def run(folder: Path, name: str, clients: int, asked: int, rounds: int, sigma: float = 0.0) -> Measured:
    """Run an experiment and watch it."""
    experiment = folder / f"{name}.toml"
    experiment.write_text(f"""
rounds = {rounds}
rules = ["fedavg"]
fraction = {asked / clients}
data = {{ source = "{folder}", mean = 0.5, deviation = 0.3 }}
partition = {{ kind = "drawn", clients = {clients}, examples = 100, sigma = {sigma}, alpha = 1.0 }}
train = {{ learning_rate = 0.05, batch_size = 10, epochs = 1 }}
evaluate = {{ every = 1000 }}
""")
    out = folder / name
    process = subprocess.Popen([CORYMB, "simulate", experiment, "--out", out], stdout=subprocess.DEVNULL)
    samples: list[float] = []
    while process.poll() is None:
        with suppress(OSError, ValueError):  # it has just ended
            samples.append(memory(process.pid))
        time.sleep(0.3)
    if process.returncode:
        raise RuntimeError(f"{name} failed")
    (journal,) = (out / "journals").iterdir()
    with sqlite3.connect(journal / "journal.sqlite") as database:
        seconds = [line[0] for line in database.execute("SELECT seconds FROM rounds ORDER BY round")]
        query = "SELECT SUM(json_extract(metrics, '$.steps')) FROM verdicts GROUP BY round"
        steps = statistics.mean(line[0] for line in database.execute(query))
    half = len(samples) // 2
    return Measured(seconds, steps, max(samples[:half]), max(samples[half:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(folder)
        settings = {
            "1,000 of 1,000": (1_000, 1_000, options.rounds, 0.0),
            "1,000 of 100,000": (100_000, 1_000, options.rounds, 0.0),
            "1,000 of 100,000, lognormal": (100_000, 1_000, options.rounds, 1.0),
            "100,000 of 100,000": (100_000, 100_000, 1, 0.0),
        }
        found = {}
        for what, (clients, asked, rounds, sigma) in settings.items():
            result = found[what] = run(folder, what.replace(" ", "-").replace(",", ""), clients, asked, rounds, sigma)
            print(
                f"{what:28} {result.median:7.2f} s a round, {1e6 * result.median / result.steps:6.1f} us a step, "
                f"at most {max(result.early, result.late):.2f} GB (first half {result.early:.2f})",
                flush=True,
            )
    few, many, uneven = (found[what] for what in list(settings)[:3])
    slower = many.median / few.median
    padding = (uneven.median / uneven.steps) / (many.median / many.steps)
    print(f"100,000 beside 1,000: {slower:.2f}x the time (bar 1.2x); lognormal: {padding:.2f}x a step (bar 1.5x)")
    most = max(max(result.early, result.late) for result in found.values())
    sys.exit(slower > 1.2 or padding > 1.5 or most > 2)


if __name__ == "__main__":
    main()
