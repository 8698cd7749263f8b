"""A plain Flower app, which does not use Corymb: clients send back the model they received."""

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    finished: list[float] = []

    def clock(server_round: int, arrays: ArrayRecord) -> None:
        finished.append(time.perf_counter())

    nodes = int(context.run_config["nodes"])
    strategy = FedAvg(min_available_nodes=nodes, min_train_nodes=nodes, min_evaluate_nodes=nodes)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(7850, dtype=np.float32)]),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=clock,
    )
    seconds = [after - before for before, after in pairwise(finished)]
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds))
