"""Measure the conversion of a model of 100 million parameters to message bytes and back.

The result is relative to the time of one copy and one SHA-256 of the same bytes.

python benchmarks/codec.py [--numbers 100000000]
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import flwr.app
import torch

from corymb.protocol.codec import to_arrays, to_state

TARGET = 2.5  # the conversion may take this many times as long as one copy and one SHA-256


def median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=100_000_000)
    numbers = parser.parse_args().numbers
    state = {f"layer{index}": torch.randn(numbers // 20) for index in range(20)}
    whole = torch.cat(list(state.values()))
    target = torch.empty_like(whole)

    def round_trip() -> dict[str, torch.Tensor]:
        sent = to_arrays(state)
        received = {name: flwr.app.Array(a.dtype, a.shape, a.stype, a.data) for name, a in sent.items()}
        return to_state(flwr.app.ArrayRecord(received))

    state_back = round_trip()
    assert all(torch.equal(state_back[name], tensor) for name, tensor in state.items())
    del state_back
    seconds = median_seconds(round_trip)
    baseline = median_seconds(lambda: target.copy_(whole)) + median_seconds(
        lambda: hashlib.sha256(whole.numpy().data).digest()
    )
    ratio = seconds / baseline
    print(f"{1000 * seconds:.0f} ms; copy and SHA-256 {1000 * baseline:.0f} ms: {ratio:.2f}x (target {TARGET}x)")
    sys.exit(ratio > TARGET)


if __name__ == "__main__":
    main()
