"""How fast are the sums, medians and distances of a round, beside Flower's and beside copying the same numbers?

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
from corymb.strategies.core.order_statistics import median, middle


def seconds(*works: Callable[[], Any], repeats: int = 5) -> list[float]:
    """The median time of each of `works`, run in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, mine in zip(works, times, strict=True):
            time.sleep(0.3)  # the threads of the library before spin for a while
            started = time.perf_counter()
            work()
            mine.append(time.perf_counter() - started)
    return [statistics.median(mine) for mine in times]


def told(what: str, ours: float, theirs: float, bar: float) -> bool:
    """Print a ratio; whether it is short of its bar."""
    print(f"{what:44} {1000 * ours:8.1f} ms, beside {1000 * theirs:8.1f} ms: {theirs / ours:5.2f}x (bar {bar:g}x)")
    return theirs / ours < bar


def weighted_mean(numbers: int, clients: int) -> bool:
    """Replies that come one by one: the bytes that go through memory in a second, beside those of copying each once.

    Counted as STREAM does: a copy reads four bytes of a number and writes four. To add it to a sum, four of the reply
    and four of the model are read, and the float64 sum is read and written.
    """
    origin = Model(torch.randn(numbers))
    few = [Reply.of(f"site-{i}", torch.randn(numbers), i + 1) for i in range(4)]
    place = torch.empty(numbers)

    def stream() -> None:
        total = WeightedSum(origin)
        for i in range(clients):
            total.add(few[i % 4], float(i + 1))
        total.model(1 / total.weight)

    def copy() -> None:
        for i in range(clients):
            place.copy_(few[i % 4].parts[0])

    ours, copies = (taken / clients for taken in seconds(stream, copy, repeats=3))
    speed, most = 24 * numbers / ours / 1e9, 8 * numbers / copies / 1e9
    what = f"weighted mean of {clients} x {numbers:,}"
    print(f"{what:44} {speed:8.1f} GB/s, beside {most:6.1f} GB/s copying: {speed / most:5.2f}x (bar 0.5x)")
    print(f"    {1000 * ours:.1f} ms for each reply, {1000 * copies:.1f} ms for copying it: {copies / ours:.2f}x")
    return speed / most < 0.5


def robust(numbers: int, clients: int) -> int:
    """Median, trimmed mean and distances, beside the functions of Flower's own strategies."""
    models = torch.randn(clients, numbers)
    arrays = list(models.numpy())
    cut = clients // 5
    ours, theirs = seconds(lambda: median(models), lambda: np.median(np.stack(arrays), axis=0), repeats=3)
    missed = 0
    missed += told(f"median of {clients} x {numbers:,}", ours, theirs, 10)
    ours, theirs = seconds(
        lambda: middle(models, cut, clients - cut - 1), lambda: trim_mean(np.stack(arrays), 0.2), repeats=3
    )
    missed += told(f"trimmed mean of {clients} x {numbers:,}", ours, theirs, 10)
    records = [ArrayRecord({"model": Array(array)}) for array in arrays]
    ours, theirs = seconds(lambda: squared_distances(models), lambda: compute_distances(records), repeats=3)
    missed += told(f"all distances of {clients} x {numbers:,}", ours, theirs, 4)
    late = 1 + 1e-4 * models
    exact = torch.stack([(late.double() - model.double()).square().sum(dim=1) for model in late[:5]])
    records = [ArrayRecord({"model": Array(array)}) for array in late.numpy()]
    for name, found in (
        ("Corymb", squared_distances(late)[:5]),
        ("Flower", torch.from_numpy(np.asarray(compute_distances(records)))[:5].double()),
    ):
        errors = ((found - exact).abs() / exact)[exact > 0]
        print(f"    late in training {name} errs by {float(errors.median()):.0e} in the median")
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
