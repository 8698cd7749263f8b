"""The workload in Flower's own simulation (Ray); each actor creates the model and the data once."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", FLWR_UPDATE_CHECK="0")
HERE = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, HERE)

import workload
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

logging.getLogger("flwr").setLevel(logging.ERROR)


def client_app(model: str, epochs: int, batch: int, ordered: bool) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sys.path.insert(0, HERE)
        import torch
        import workload

        cache: dict[str, Any] = workload.__dict__.setdefault("cache", {})
        if not cache:
            torch.set_num_threads(1)
            cache["data"] = [torch.from_numpy(array) for array in workload.data(model)]
            cache["module"] = workload.torch_model(model)
        client = int(context.node_config["partition-id"])
        inputs, targets = (array[client] for array in cache["data"])
        module = cache["module"]
        received = message.content["arrays"].to_torch_state_dict()
        module.load_state_dict(received, strict=False)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=workload.RATE)
        for _ in range(epochs):
            order = torch.arange(workload.EXAMPLES) if ordered else torch.randperm(workload.EXAMPLES)
            for rows in order.split(batch):
                optimizer.zero_grad()
                workload.loss(module(inputs[rows]), targets[rows]).backward()
                optimizer.step()
        state = {name: tensor for name, tensor in module.state_dict().items() if name in received}
        content = RecordDict(
            {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": workload.EXAMPLES})}
        )
        return Message(content=content, reply_to=message)

    return app


def main() -> None:
    options = workload.options().parse_args()
    times: list[float] = []
    last: list[Any] = []
    rounds = options.warmup + options.rounds

    class Timed(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Any:
            times.append(time.perf_counter())
            return super().configure_train(server_round, arrays, config, grid)

    app = ServerApp()

    @app.main()
    def server(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=options.clients / workload.CLIENTS,
            fraction_evaluate=0.0,
            min_available_nodes=workload.CLIENTS,
        )
        initial = ArrayRecord(workload.shared_state(workload.torch_model(options.model)))
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)
        times.append(time.perf_counter())
        last.extend(result.arrays.to_numpy_ndarrays())

    run_simulation(
        app,
        client_app(options.model, options.epochs, options.batch, options.ordered),
        num_supernodes=workload.CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False},
        },
    )
    workload.report([b - a for a, b in zip(times, times[1:], strict=False)], options.warmup, last)


main()
