"""How long does a model of 100 million parameters take to message bytes and back, beside one copy and one SHA-256?

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

BAR = 2.5


def median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=100_000_000)
    numbers = parser.parse_args().numbers
    state = {f"layer{place}": torch.randn(numbers // 20) for place in range(20)}
    whole = torch.cat(list(state.values()))
    place = torch.empty_like(whole)

    def there_and_back() -> dict[str, torch.Tensor]:
        sent = to_arrays(state)
        received = {name: flwr.app.Array(a.dtype, a.shape, a.stype, a.data) for name, a in sent.items()}
        return to_state(flwr.app.ArrayRecord(received))

    back = there_and_back()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    del back
    ours = median_seconds(there_and_back)
    floor = median_seconds(lambda: place.copy_(whole)) + median_seconds(
        lambda: hashlib.sha256(whole.numpy().data).digest()
    )
    print(f"{1000 * ours:.0f} ms, beside {1000 * floor:.0f} ms of copy and SHA-256: {ours / floor:.2f}x (bar {BAR}x)")
    sys.exit(ours / floor > BAR)


if __name__ == "__main__":
    main()
