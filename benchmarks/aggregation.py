"""Measure the weighted mean, medians and distances of a round against Flower's functions and against memory copies.

python benchmarks/aggregation.py [--clients 50] [--numbers 1000000]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import compute_distances

from corymb.strategies import Model, Reply
from corymb.strategies.core.blind import WeightedSum
from corymb.strategies.core.geometry import squared_distances
from corymb.strategies.core.order_statistics import median, rank_mean


def seconds(*functions: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Return the median time of each of `functions`, run in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, samples in zip(functions, times, strict=True):
            time.sleep(0.3)  # the threads of the library that ran before spin for a while
            started = time.perf_counter()
            function()
            samples.append(time.perf_counter() - started)
    return [statistics.median(samples) for samples in times]


def misses_target(operation: str, corymb: float, flower: float, target: float) -> bool:
    """Print the speedup over Flower; return whether it is below `target`."""
    print(
        f"{operation:44} {1000 * corymb:8.1f} ms, Flower {1000 * flower:8.1f} ms: "
        f"{flower / corymb:5.2f}x (target {target:g}x)"
    )
    return flower / corymb < target


def weighted_mean(numbers: int, clients: int) -> bool:
    """Measure the memory bandwidth of a weighted mean of replies that arrive one by one, and of copying each once.

    Bytes are counted as in the STREAM benchmark. A copy reads four bytes per number and writes four. Adding a reply
    to the sum reads four bytes of the reply and four of the model, and reads and writes eight of the float64 sum.
    Prints the ratio and returns whether it is below the target.
    """
    origin = Model(torch.randn(numbers))
    replies = [Reply.of(f"site-{i}", torch.randn(numbers), i + 1) for i in range(4)]
    target = torch.empty(numbers)

    def stream() -> None:
        total = WeightedSum(origin)
        for i in range(clients):
            total.add(replies[i % 4], float(i + 1))
        total.model(1 / total.weight)

    def copy() -> None:
        for i in range(clients):
            target.copy_(replies[i % 4].parts[0])

    sum_time, copy_time = (total / clients for total in seconds(stream, copy, repeats=3))
    bandwidth, copy_bandwidth = 24 * numbers / sum_time / 1e9, 8 * numbers / copy_time / 1e9
    operation, ratio = f"weighted mean of {clients} x {numbers:,}", bandwidth / copy_bandwidth
    print(f"{operation:44} {bandwidth:8.1f} GB/s, copy {copy_bandwidth:6.1f} GB/s: {ratio:5.2f}x (target 0.5x)")
    print(f"    {1000 * sum_time:.1f} ms per reply, copy {1000 * copy_time:.1f} ms: {copy_time / sum_time:.2f}x")
    return ratio < 0.5


def robust(numbers: int, clients: int) -> int:
    """Measure median, trimmed mean and distances against Flower's functions; return how many miss their target."""
    models = torch.randn(clients, numbers)
    arrays = list(models.numpy())
    cut = clients // 5
    corymb, flower = seconds(lambda: median(models), lambda: np.median(np.stack(arrays), axis=0), repeats=3)
    missed = 0
    missed += misses_target(f"median of {clients} x {numbers:,}", corymb, flower, 10)
    corymb, flower = seconds(
        lambda: rank_mean(models, cut, clients - cut - 1), lambda: trim_mean(np.stack(arrays), 0.2), repeats=3
    )
    missed += misses_target(f"trimmed mean of {clients} x {numbers:,}", corymb, flower, 10)
    records = [ArrayRecord({"model": Array(array)}) for array in arrays]
    corymb, flower = seconds(lambda: squared_distances(models), lambda: compute_distances(records), repeats=3)
    missed += misses_target(f"all distances of {clients} x {numbers:,}", corymb, flower, 4)
    late_models = 1 + 1e-4 * models
    exact = torch.stack([(late_models.double() - model.double()).square().sum(dim=1) for model in late_models[:5]])
    records = [ArrayRecord({"model": Array(array)}) for array in late_models.numpy()]
    for name, distances in (
        ("Corymb", squared_distances(late_models)[:5]),
        ("Flower", torch.from_numpy(np.asarray(compute_distances(records)))[:5].double()),
    ):
        errors = ((distances - exact).abs() / exact)[exact > 0]
        print(f"    {name}: median relative error {float(errors.median()):.0e} for models late in training")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    options = parser.parse_args()
    missed = robust(options.numbers, options.clients)
    missed += weighted_mean(10 * options.numbers, 2 * options.clients)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
