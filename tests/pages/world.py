"""A federation on disk as `corymb serve` leaves it: a real kit, and journals that the real round loop has written."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from corymb.pages.numbers import Federation
from corymb.protocol.codec import to_arrays
from corymb.server import FlowerStrategy, Journal, NoReplyAdmitted
from corymb.server.deployment.federation import FederationSettings, read
from corymb.server.deployment.provision import Federation as Provisioned
from corymb.server.deployment.status import SITES
from corymb.server.rounds.staleness import Asynchrony
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg

NAMES = ("north", "south", "west")


def make_kit(folder: Path, names: tuple[str, ...] = NAMES, days: int = 365) -> Path:
    """Provision a federation with these sites, whose keys are here, and return the kit of its server."""
    file = folder / "hearts.toml"
    listed = json.dumps(list(names))
    file.write_text(f'name = "hearts"\nserver = "localhost"\nsites = {listed}\ndays = {days}\n')
    federation = Provisioned(read(file, FederationSettings), file.with_suffix(""))
    federation.create()
    federation.make_keys_here(list(names))
    return federation.server


def publish(kit: Path, online: tuple[str, ...] = NAMES, runs: dict[str, str] | None = None, ago: float = 0.0) -> None:
    """Write what the monitor has seen `ago` seconds ago."""
    at = datetime.fromtimestamp(time.time() - ago, UTC).isoformat(timespec="seconds")
    sites = {name: {"online": name in online, "since": at, "node": "1"} for name in NAMES}
    (kit / "var").mkdir(exist_ok=True)
    (kit / "var" / SITES).write_text(json.dumps({"at": at, "sites": sites, "runs": runs or {}, "runs_since": at}))


def client(wrong: str = "", seconds: float = 0.0) -> ClientApp:
    """Return an app that trains nothing; the site `wrong` sends NaN."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(seconds)
        state = dict(message.content.array_records["arrays"].to_torch_state_dict())
        if str(context.node_config.get("name", "")) == wrong and wrong:
            state = {name: tensor * float("nan") for name, tensor in state.items()}
        metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
        return Message(RecordDict({"arrays": to_arrays(state), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        number = int(str(message.content.config_records["config"]["server-round"]))
        metrics = MetricRecord({"num-examples": 4, "accuracy": 1 - 1 / (number + 1), "loss": 1 / number})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def run_rounds(
    folder: Path,
    rounds: int = 3,
    names: tuple[str, ...] = NAMES,
    wrong: str = "",
    seconds: float = 0.0,
    quorum: int = 2,
    asynchrony: Asynchrony | None = None,
) -> None:
    """Run the real round loop with a durable journal in `folder`, as a deployment does."""
    journal = Journal(folder, notes={"flower-run": folder.name.rpartition("-")[2]})
    strategy = FlowerStrategy(
        FedAvg(), journal=journal, quorum=quorum, min_available_nodes=1, max_abandoned=99, asynchrony=asynchrony
    )
    grid = LocalGrid(client(wrong, seconds), list(names), node_config=lambda row: {"name": names[row]})
    try:
        with suppress(NoReplyAdmitted):  # the journal has its sentence
            strategy.start(grid, to_arrays({"w": torch.zeros(1000)}), rounds, 60)
    finally:
        grid.close()
        journal.close()


def federation(folder: Path, **run: object) -> Federation:
    """Return a federation whose run 1 has ended."""
    kit = make_kit(folder)
    run_rounds(kit / "var" / "corymb" / "runs" / "run-1", **run)  # type: ignore[arg-type]
    publish(kit, runs={"1": "finished:completed"})
    return Federation(kit, parent=os.getppid())
