"""How much memory does aggregating 50 replies of a 10M-parameter model take, here and in Flower's FedAvg?

Each strategy runs in a process of its own, two rounds on a LocalGrid whose clients read their replies,
ready-made .npy bytes, from files: what the process grows by is the server's. Figures are the highest resident
memory while the federation runs, in models (40 MB of float32), over two bases:

- "idle": the process before the first round, with the initial model in it;
- "receiving": the same process doing all the same (it holds the model, sends it, takes each reply through the
  door) but dropping each reply instead of aggregating it. The bar of 3 is over this one.

One reply is a model and the sum, in float64, is two: 3.0 over idle is the least that this sum allows, and allocators
add a tenth or two. See docs/design.md for why it is float64.

    python benchmarks/streaming_memory.py [--replies 50] [--parameters 10000000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from corymb.server import FlowerStrategy
from corymb.server.rounds.door import Door
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAU, FedAvg

BAR = 3.0
LAYERS = 5
FILES = 4  # replies differ, but need not all do so
ROUNDS = 2


class Receiving(FlowerStrategy):
    """Takes every reply through the door, and drops it."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
        """See `FlowerStrategy`."""
        door = Door(self.state.model.layers)
        for reply in replies:
            door.admit("site", reply)
            del reply  # before the next one comes
        return None, None


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "receiving": lambda: Receiving(FedAvg(), fraction_evaluate=0),
    "Corymb FedAvg": lambda: FlowerStrategy(FedAvg(), fraction_evaluate=0),
    "Corymb FedAU": lambda: FlowerStrategy(FedAU(), fraction_evaluate=0),
    "Flower FedAvg": lambda: flower.FedAvg(fraction_evaluate=0.0),
}


def status(field: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def serve(name: str, folder: Path, replies: int, parameters: int) -> None:
    """Run one strategy and print by how many bytes the process grew."""
    shape = (parameters // LAYERS,)

    def client(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        arrays = ArrayRecord()
        for layer in range(LAYERS):
            data = (folder / f"{partition % FILES}-{layer}.npy").read_bytes()
            arrays[f"layer{layer}"] = Array("float32", shape, "numpy.ndarray", data)
        metrics = MetricRecord({"num-examples": 10 + partition})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = LocalGrid(client, replies)
    strategy = STRATEGIES[name]()
    # One small round first, of the same kind: what torch and Flower load at their first use is no model's.
    wire = ArrayRecord({"w": Array(np.zeros(100_000, dtype=np.float32))})
    sent = RecordDict({"arrays": wire, "metrics": MetricRecord({"num-examples": 1})})
    small = LocalGrid(lambda message, context: Message(sent, reply_to=message), 2)
    STRATEGIES[name]().start(small, wire, num_rounds=2)

    def initial() -> ArrayRecord:
        zeros = np.zeros(shape, dtype=np.float32)
        return ArrayRecord({f"layer{layer}": Array(zeros) for layer in range(LAYERS)})

    handed_over = [initial()]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    base = status("VmRSS")
    strategy.start(grid, handed_over.pop(), num_rounds=ROUNDS)
    print(json.dumps(status("VmHWM") - base))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=50)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.replies, options.parameters)
        return
    size = 4 * options.parameters
    idle = {}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for file in range(FILES):
            for layer in range(LAYERS):
                numbers = rng.standard_normal(options.parameters // LAYERS, dtype=np.float32)
                np.save(Path(folder) / f"{file}-{layer}.npy", numbers)
        print("models over       idle  receiving")
        for name in STRATEGIES:
            command = [sys.executable, __file__, "--serve", name, "--folder", folder]
            command += ["--replies", str(options.replies), "--parameters", str(options.parameters)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            idle[name] = json.loads(output.stdout.splitlines()[-1]) / size
            print(f"{name:15} {idle[name]:6.2f} {idle[name] - idle['receiving']:10.2f}")
    worst = max(idle["Corymb FedAvg"], idle["Corymb FedAU"]) - idle["receiving"]
    print(f"Corymb's worst over receiving: {worst:.2f} models (bar: under {BAR})")
    sys.exit(worst >= BAR)


if __name__ == "__main__":
    main()
