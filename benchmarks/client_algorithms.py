"""How much longer is a round with a client algorithm than a round of FedAvg, with the default settings?

The multilayer perceptron 784-200-10 of the other benchmarks; 10 of 100 clients with 100 examples each train one epoch
in batches of 32, or more epochs. Each line is a rule: the median seconds of its rounds and their ratio to FedAvg's.

    python benchmarks/client_algorithms.py [--rounds 30] [--epochs 1]
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
from corymb.simulations.experiments.resolved import resolve
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
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    table: dict[str, Any] = {
        "name": "algorithms", "rounds": rounds, "fraction": 0.1, "rules": RULES,
        "data": {"source": f"{__name__}:noise"}, "train": {"epochs": arguments.epochs},
        "partition": {"kind": "iid", "clients": 100}, "model": {"kind": f"{__name__}:perceptron"},
        "evaluate": {"every": rounds, "clients": True},
    }  # fmt: skip
    experiment = Experiment(**table)
    with tempfile.TemporaryDirectory() as place:
        prepare(experiment, Path(place), False)
        (runs,) = run_all([(resolve(experiment), Path(place))], Console(quiet=True))
    base = None
    for run in runs:
        seconds = statistics.median(record.seconds for record in run.records[2:-1])
        base = base or seconds
        print(f"{run.rule:10} {1000 * seconds:7.1f} ms  {seconds / base:5.2f}")


if __name__ == "__main__":
    main()
