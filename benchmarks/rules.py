"""Measure the time of a round under rules that read single models, relative to FedAvg in the same run.

Blocks of clients compute sums and distances without writing models out, so the cost depends on the rule. The
workloads are those of `simulators.py`. The results are medians over rounds, with door, verdicts and journal. `make
bench` runs this script.

    python benchmarks/rules.py [--rows softmax mlp-5] [--rules krum ida]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import workload
from rich.console import Console
from simulators import ROWS, WARMUP, write_experiment

from corymb.simulations.experiments.reader import read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.runner import run_all

RULES = ["norm_clipping", "krum", "ida", "median", "trimmed_mean", "centred_clipping", "geometric_median"]


def times(row: str, rules: list[str]) -> list[float]:
    """Return the median milliseconds of a round under each of `rules`."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = read(write_experiment(ROWS[row], Path(folder)), {"rules": rules})
        (runs,) = run_all([(resolve(experiment), Path(folder) / "out")], Console(quiet=True))
        return [workload.median([record.seconds for record in run.records[WARMUP:]]) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=["softmax", "mlp", "mlp-5"])
    parser.add_argument("--rules", nargs="*", default=RULES)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    for row in options.rows:
        first, *others = times(row, ["fedavg", *options.rules])
        print(f"{row}: fedavg {first:.1f} ms")
        for rule, milliseconds in zip(options.rules, others, strict=True):
            print(f"    {rule:20}{milliseconds:8.1f} ms = {milliseconds / first:.2f}x", flush=True)


if __name__ == "__main__":
    main()
