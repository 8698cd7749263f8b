"""How long does a round of the CNN with 100 clients take on a GPU, here and in pfl-research?

Corymb runs through `corymb simulate`, and is told at what share of the device's peak. `--device cpu` is for machines
without a GPU, to see that the script runs; `make bench` makes the environment of pfl-research.

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

BAR = 10
MULTIPLIED = 2 * (28 * 28 * 32 * 25 * 2 + 14 * 14 * 64 * 800 * 3 + 3136 * 512 * 3 + 512 * 10 * 3)  # FLOP per example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, default=67.0, help="TFLOP/s of the device in float32 (an H100: 67)")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    row = simulators.Row("cnn", options.clients, 1, 10, options.rounds, {})
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(options.repeats):
        ours += simulators.by_corymb(row, options.device)["seconds"]
        theirs += simulators.told_by("pfl", row, [], None, options.device)["seconds"]
    mine, peer = statistics.median(ours), statistics.median(theirs)
    speed = MULTIPLIED * options.clients * workload.EXAMPLES / mine / 1e12
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"CNN, {options.clients} clients a round on {name}:")
    print(f"Corymb {1000 * mine:.1f} ms, pfl-research {1000 * peer:.1f} ms")
    print(f"ratio {peer / mine:.1f} (bar: {BAR}); {speed:.2f} TFLOP/s, {100 * speed / options.peak:.1f} % of the peak")
    sys.exit(peer / mine < BAR)


if __name__ == "__main__":
    main()
