"""Measure a round of the CNN with 100 clients on a GPU, in Corymb and in pfl-research.

Corymb runs through `corymb simulate`; the script also prints its share of the device's peak performance. With
`--device cpu` the script only checks that it runs. `make bench` creates the environment of pfl-research.

    python benchmarks/gpu.py [--device cuda] [--peak 67] [--clients 100] [--rounds 8]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import simulators
import torch
import workload

TARGET = 10  # times as fast as pfl-research
FLOP_PER_EXAMPLE = 2 * (28 * 28 * 32 * 25 * 2 + 14 * 14 * 64 * 800 * 3 + 3136 * 512 * 3 + 512 * 10 * 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, default=67.0, help="TFLOP/s of the device in float32 (an H100: 67)")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    row = simulators.Row("cnn", options.clients, 1, 10, options.rounds, {})
    corymb_seconds: list[float] = []
    peer_seconds: list[float] = []
    for _ in range(options.repeats):
        corymb_seconds += simulators.run_corymb(row, options.device)["seconds"]
        peer_seconds += simulators.run_script("pfl", row, [], [], None, options.device)["seconds"]
    corymb, peer = statistics.median(corymb_seconds), statistics.median(peer_seconds)
    speed = FLOP_PER_EXAMPLE * options.clients * workload.EXAMPLES / corymb / 1e12
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"CNN, {options.clients} clients a round on {name}:")
    print(f"Corymb {1000 * corymb:.1f} ms, pfl-research {1000 * peer:.1f} ms")
    print(f"ratio {peer / corymb:.1f} (target: {TARGET})")
    print(f"{speed:.2f} TFLOP/s, {100 * speed / options.peak:.1f} % of the peak")
    sys.exit(peer / corymb < TARGET)


if __name__ == "__main__":
    main()
