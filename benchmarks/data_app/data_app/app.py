"""A plain Flower app, which does not use Corymb: each client reads a file of 50 MB and trains one epoch on it."""

import json
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()
INPUTS = 784


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


@cache
def examples(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.from_numpy(np.load(path)).float()
    return (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-6), (inputs[:, 0] > 0).long()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = make_model()
    model.load_state_dict(cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
    inputs, targets = examples(str(context.node_config["data"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for rows in torch.randperm(len(targets)).split(256):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(targets)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = make_model()
    model.load_state_dict(cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
    inputs, targets = examples(str(context.node_config["data"]))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs), targets).item()
    return Message(
        RecordDict({"metrics": MetricRecord({"num-examples": len(targets), "loss": loss})}), reply_to=message
    )


@server.main()
def main(grid: Grid, context: Context) -> None:
    finished: list[float] = []

    def clock(server_round: int, arrays: ArrayRecord) -> None:
        finished.append(time.perf_counter())

    nodes = int(context.run_config["nodes"])
    strategy = FedAvg(min_available_nodes=nodes, min_train_nodes=nodes, min_evaluate_nodes=nodes)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(make_model().state_dict()),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=clock,
    )
    seconds = [after - before for before, after in pairwise(finished)]
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds))
