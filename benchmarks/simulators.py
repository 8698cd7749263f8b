"""Measure a round in Corymb and, on the same workload, in Flower's simulation, pfl-research and FedJAX.

Corymb runs through `corymb simulate` with its default settings, and with rule, door, verdicts and journal. The runs of
Corymb and its peers alternate, and each result is the median over rounds. With --ordered, nobody shuffles, and FedJAX,
which draws the same clients in the same order, must end with the same checksum. `make bench` runs this script and
creates the environments of the peers.

    python benchmarks/simulators.py [--rows softmax mlp] [--peers fedjax] [--repeats 2] [--ordered]
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import workload

from corymb.simulations.cores import cores

Result = dict[str, Any]


class Row(NamedTuple):
    """A workload; `targets` says how many times as fast as each peer Corymb has to be."""

    model: str
    clients: int
    epochs: int
    batch: int
    rounds: int
    targets: dict[str, float]


ROWS = {
    "softmax": Row("softmax", 50, 1, 10, 16, {"flower": 20, "pfl": 5, "fedjax": 4}),
    "mlp": Row("mlp", 50, 1, 10, 10, {"flower": 15, "pfl": 4, "fedjax": 4}),
    "mlp-5": Row("mlp", 50, 5, 20, 10, {"flower": 20, "pfl": 6, "fedjax": 6}),
    "cnn": Row("cnn", 10, 1, 10, 6, {"flower": 2.2, "pfl": 1.5, "fedjax": 3}),
    "resnet_batch_norm": Row("resnet_batch_norm", 10, 1, 10, 4, {"flower": 1.15}),
    "resnet_group_norm": Row("resnet_group_norm", 10, 1, 10, 4, {"flower": 1.15}),
    "gru": Row("gru", 10, 1, 10, 6, {"flower": 1.5}),
    "transformer": Row("transformer", 10, 1, 10, 4, {"flower": 1.5}),
    "resnet_cifar": Row("resnet_cifar", 10, 1, 10, 4, {"flower": 1.5, "pfl": 1.5}),
    "gru_text": Row("gru_text", 10, 1, 10, 4, {"flower": 1.5, "pfl": 1.5}),
    "lora": Row("lora", 10, 1, 10, 4, {"flower": 1.5, "pfl": 1.5}),
}
CORYMB = Path(sys.executable).parent / "corymb"
PYTHON = {
    "flower": Path(sys.executable),
    "pfl": ROOT / ".peers/pfl/bin/python",
    "fedjax": ROOT / ".peers/fedjax/bin/python",
}
SCRIPTS = {"flower": "flower_simulation.py", "pfl": "pfl_research.py", "fedjax": "fedjax_simulator.py"}
WARMUP = 2  # rounds


def write_experiment(row: Row, folder: Path, device: str = "cpu", ordered: bool = False) -> Path:
    """Write the workload's experiment and data files to `folder`; return the path of the experiment."""
    inputs, targets = (array.reshape(-1, *array.shape[2:]) for array in workload.data(row.model))
    offsets = np.arange(workload.CLIENTS + 1) * workload.EXAMPLES
    np.savez(
        folder / "data.npz",
        x_train=inputs, y_train=targets, x_test=inputs[:100], y_test=targets[:100], offsets=offsets,
    )  # fmt: skip
    model = f'{{ kind = "workload:{row.model}" }}'
    if row.model not in workload.SHAPES:
        model = f'{{ kind = "workload:field", options = {{ name = "{row.model}" }} }}'
    (folder / "workload.toml").write_text(f"""
rounds = {WARMUP + row.rounds}
rules = ["fedavg"]
fraction = {row.clients / workload.CLIENTS}
blocks = {cores() if device == "cpu" else 1}
data = {{ source = "{folder}/data.npz" }}
partition = {{ kind = "site" }}
model = {model}
evaluate = {{ every = 1000 }}
{'task = { kind = "tokens" }' if row.model in workload.TEXT else ""}

[train]
learning_rate = {workload.RATE}
batch_size = {row.batch}
epochs = {row.epochs}
shuffle = {str(not ordered).lower()}
device = "{device}"
""")
    return folder / "workload.toml"


def run_corymb(row: Row, device: str = "cpu", ordered: bool = False) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experiment = write_experiment(row, folder, device, ordered)
        command = [str(CORYMB), "simulate", str(experiment), "--out", f"{folder}/out"]
        subprocess.run(command, check=True, capture_output=True, cwd=HERE)
        (journal,) = (folder / "out/journals").iterdir()
        with sqlite3.connect(journal / "journal.sqlite") as database:
            seconds = [line[0] for line in database.execute("SELECT seconds FROM rounds ORDER BY round")]
        model = load_file(max(journal.glob("model-*.safetensors")))
        return {"seconds": seconds[WARMUP:], "checksum": workload.checksum(model.values())}


def run_peer(peer: str, row: Row, ordered: bool) -> Result:
    """Return the result of a peer; for pfl-research, the faster one of a single process and of two processes."""
    if peer != "pfl":
        return run_script(peer, row, ["--ordered"] * ordered, [], "2")
    alone, pair = (
        run_script(peer, row, [], launcher, "1")
        for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node", "2"])
    )
    faster = min(alone, pair, key=lambda result: workload.median(result["seconds"]))
    return {**faster, "seconds of one process": alone["seconds"]}


def run_script(
    peer: str, row: Row, extra: list[str], launcher: list[str], threads: str | None, device: str = "cpu"
) -> Result:
    """Run a peer's script in its own environment, with `launcher` as arguments of Python; return its result."""
    command = [
        str(PYTHON[peer]), *launcher, str(HERE / "peers" / SCRIPTS[peer]), f"--model={row.model}",
        f"--clients={row.clients}", f"--epochs={row.epochs}", f"--batch={row.batch}", f"--rounds={row.rounds}",
        f"--warmup={WARMUP}", f"--device={device}", *extra,
    ]  # fmt: skip
    environment = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in completed.stdout.splitlines() if line.startswith('{"seconds"')]
    if not lines:
        raise RuntimeError(f"The script of {peer} failed: {completed.stderr[-2000:]}")
    result: Result = json.loads(lines[-1])
    return result


def overhead(row: Row) -> str:
    """Return how Corymb spends the time of a round, from a separate run of `overhead.py`."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, str(HERE / "overhead.py"), str(write_experiment(row, Path(name)))]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--peers", nargs="*", choices=list(PYTHON), default=list(PYTHON))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ordered", action="store_true", help="train on the examples in their stored order")
    options = parser.parse_args()
    missed = 0
    print(f"{'workload':20}{'Corymb':>10}" + "".join(f"{peer:>34}" for peer in options.peers))
    for name in options.rows:
        row = ROWS[name]
        peers = [peer for peer in options.peers if peer in row.targets]
        results: dict[str, list[Result]] = {peer: [] for peer in ("corymb", *peers)}
        for _ in range(options.repeats):
            for peer in results:
                run = partial(run_corymb, row) if peer == "corymb" else partial(run_peer, peer, row)
                results[peer].append(run(ordered=options.ordered))
        times = {
            peer: workload.median([second for run in runs for second in run["seconds"]])
            for peer, runs in results.items()
        }
        checksum = results["corymb"][0]["checksum"]
        line = f"{name:20}{times['corymb']:7.1f} ms"
        for peer in peers:
            ratio = times[peer] / times["corymb"]
            missed += ratio < row.targets[peer]
            peer_checksum = results[peer][0]["checksum"]
            compares = peer == "fedjax" and options.ordered
            difference = f", checksum {peer_checksum / checksum - 1:+.0e}" if compares else ""
            line += f"{f'{times[peer]:.0f} ms = {ratio:.1f}x ({row.targets[peer]:g}x{difference})':>34}"
        print(line, flush=True)
        if "pfl" in results:
            alone = [second for run in results["pfl"] for second in run["seconds of one process"]]
            print(f"{'':20}than one process of pfl: {workload.median(alone) / times['corymb']:.1f}x", flush=True)
        print(f"{'':20}time of a round: {overhead(row)}", flush=True)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
