"""Measure a round of 50 clients that do no work, on LocalGrid and in Flower's own simulation.

`flwr run` and `corymb simulate --app` run the same unmodified Flower app (train and evaluate, FedAvg) in turn on the
same machine. The first two rounds of each run are left out, because Ray starts in them.

    python benchmarks/grid_overhead.py [--nodes 50] [--rounds 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from corymb.tests.e2e.processes import processes, until

APP = str(Path(__file__).parent / "trivial_app")
TARGET = 15  # times as fast as Flower
WARMUP = 2  # rounds


def run_corymb(nodes: int, rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as started:
        out = Path(folder) / "seconds.json"
        settings = [f"--set=nodes={nodes}", f"--set=rounds={rounds}", f"--set=out={out}"]
        started.run("corymb", "simulate", "--app", APP, "--nodes", str(nodes), *settings)
        seconds: list[float] = json.loads(out.read_text())
        return seconds[WARMUP:]


def run_flower(nodes: int, rounds: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as started:
        out = Path(folder) / "seconds.json"
        settings = f'nodes={nodes} rounds={rounds} out="{out}"'
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
        started.start("run", "flwr", "run", APP, "--stream", "-c", settings, "--federation-config", federation)
        until(lambda: out.exists() and out.read_text(), 300, "the end of Flower's simulation")
        seconds: list[float] = json.loads(out.read_text())
        return seconds[WARMUP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"Flower simulation": [], "Corymb LocalGrid": []}
    for _ in range(2):
        times["Flower simulation"] += run_flower(options.nodes, options.rounds)
        times["Corymb LocalGrid"] += run_corymb(options.nodes, options.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(
            f"{name:18} {1000 * medians[name]:8.1f} ms a round "
            f"(fastest {1000 * min(seconds):.1f}, {len(seconds)} rounds)"
        )
    ratio = medians["Flower simulation"] / medians["Corymb LocalGrid"]
    print(f"ratio {ratio:.1f} (target: {TARGET})")
    sys.exit(ratio < TARGET)


if __name__ == "__main__":
    main()
