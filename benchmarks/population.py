"""Measure how time and memory depend on the number of clients in the population and in a round.

The task is softmax regression on 28x28 images. Cohorts are 1,000 clients of 1,000, 1,000 of 100,000 (with equal and
with lognormal sizes), and all of 100,000. Each client draws its examples from a memory-mapped store of 60,000 images.
Memory is the sum of the proportional set sizes (PSS) of the process and its workers, which counts shared pages once.

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


class Measurement(NamedTuple):
    """Seconds of each round, steps per round, and the peak memory in each half of the run, in GB."""

    seconds: list[float]
    steps: float
    first_peak: float
    second_peak: float

    @property
    def median(self) -> float:
        """The median seconds of the rounds after the first."""
        return statistics.median(self.seconds[1:] or self.seconds)


def store(folder: Path) -> None:
    """Write images of noise, as bytes, to `folder`."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 60_000), ("test", 1_000)):
        np.save(folder / f"x_{name}.npy", rng.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8))
        np.save(folder / f"y_{name}.npy", rng.integers(0, 10, count))


def memory(process: int) -> float:
    """Return the PSS of a process and its children, in GB."""
    total = 0.0
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for member in (process, *map(int, children)):
        lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e6
    return total


def run(folder: Path, name: str, clients: int, cohort: int, rounds: int, sigma: float = 0.0) -> Measurement:
    """Run an experiment and sample its memory."""
    experiment = folder / f"{name}.toml"
    experiment.write_text(f"""
rounds = {rounds}
rules = ["fedavg"]
fraction = {cohort / clients}
data = {{ source = "{folder}", mean = 0.5, deviation = 0.3 }}
partition = {{ kind = "drawn", clients = {clients}, examples = 100, sigma = {sigma}, alpha = 1.0 }}
train = {{ learning_rate = 0.05, batch_size = 10, epochs = 1 }}
evaluate = {{ every = 1000 }}
""")
    out = folder / name
    process = subprocess.Popen([CORYMB, "simulate", experiment, "--out", out], stdout=subprocess.DEVNULL)
    samples: list[float] = []
    while process.poll() is None:
        with suppress(OSError, ValueError):  # the process has just ended
            samples.append(memory(process.pid))
        time.sleep(0.3)
    if process.returncode:
        raise RuntimeError(f"The experiment {name!r} failed with exit code {process.returncode}.")
    (journal,) = (out / "journals").iterdir()
    with sqlite3.connect(journal / "journal.sqlite") as database:
        seconds = [line[0] for line in database.execute("SELECT seconds FROM rounds ORDER BY round")]
        query = "SELECT SUM(json_extract(metrics, '$.steps')) FROM verdicts GROUP BY round"
        steps = statistics.mean(line[0] for line in database.execute(query))
    half = len(samples) // 2
    return Measurement(seconds, steps, max(samples[:half]), max(samples[half:]))


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
        results = {}
        for title, (clients, cohort, rounds, sigma) in settings.items():
            file_name = title.replace(" ", "-").replace(",", "")
            result = results[title] = run(folder, file_name, clients, cohort, rounds, sigma)
            print(
                f"{title:28} {result.median:7.2f} s a round, {1e6 * result.median / result.steps:6.1f} us a step, "
                f"at most {max(result.first_peak, result.second_peak):.2f} GB (first half {result.first_peak:.2f})",
                flush=True,
            )
    small, large, lognormal = (results[title] for title in list(settings)[:3])
    slowdown = large.median / small.median
    padding = (lognormal.median / lognormal.steps) / (large.median / large.steps)
    print(f"100,000 against 1,000 clients: {slowdown:.2f}x the time (target: at most 1.2x)")
    print(f"lognormal against equal sizes: {padding:.2f}x the time per step (target: at most 1.5x)")
    peak = max(max(result.first_peak, result.second_peak) for result in results.values())
    print(f"most memory: {peak:.2f} GB (target: at most 2 GB)")
    sys.exit(slowdown > 1.2 or padding > 1.5 or peak > 2)


if __name__ == "__main__":
    main()
