"""How much longer is a round with a client algorithm than a round of FedAvg, with the default settings?

The multilayer perceptron 784-200-10 of the other benchmarks; 10 of 100 clients with 100 examples each train one epoch
in batches of 32, or more epochs. All rules run in turn, several times. Each line is a rule: the median time of its
rounds, its ratio to FedAvg's in the same turn as the median over the turns, and the least and the largest such ratio.

    python benchmarks/client_algorithms.py [--rounds 100] [--epochs 1] [--turns 9]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from corymb.simulations import Examples, Source
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import Resolved, resolve
from corymb.simulations.results.folder import prepare
from corymb.simulations.results.runner import run_all

RULES = ["fedavg", {"name": "fedavg", "label": "fedprox", "train": {"proximal": 0.1}}, "fednova", "scaffold", "feddyn",
         "fedper", "ditto"]  # fmt: skip


def noise() -> Source:
    """Return 10,000 images of noise in 10 classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(10_100, 1, 28, 28, generator=generator)
    targets = torch.randint(10, (10_100,), generator=generator)
    return Source(Examples(inputs[:10_000], targets[:10_000]), Examples(inputs[10_000:], targets[10_000:]))


def perceptron(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, classes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    table: dict[str, Any] = {
        "name": "algorithms", "rounds": rounds, "fraction": 0.1, "rules": RULES,
        "data": {"source": f"{__name__}:noise"}, "train": {"epochs": arguments.epochs},
        "partition": {"kind": "iid", "clients": 100}, "model": {"kind": f"{__name__}:perceptron"},
        "evaluate": {"every": rounds, "clients": True},
    }  # fmt: skip
    resolved = resolve(Experiment(**table))
    turns = [seconds_by_rule(resolved) for _ in range(arguments.turns)]
    for rule in turns[0]:
        ratios = sorted(turn[rule] / turn["fedavg"] for turn in turns)
        milliseconds = 1000 * statistics.median(turn[rule] for turn in turns)
        middle = statistics.median(ratios)
        print(f"{rule:10} {milliseconds:7.1f} ms  {middle:5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def seconds_by_rule(resolved: Resolved) -> dict[str, float]:
    """Run the experiment once; return the median time of each rule's rounds."""
    with tempfile.TemporaryDirectory() as place:
        prepare(resolved.experiment, Path(place), False)
        (runs,) = run_all([(resolved, Path(place))], Console(quiet=True))
        return {run.rule: statistics.median(record.seconds for record in run.records[2:-1]) for run in runs}


if __name__ == "__main__":
    main()
