"""Two ArrayRecords each way, with a strategy of one's own."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    row = int(context.node_config["partition-id"])
    (model,) = message.content["model"].to_numpy_ndarrays()
    (control,) = message.content["control"].to_numpy_ndarrays()
    gradient = np.random.default_rng(row).normal(size=4) - control
    content = {
        "model": ArrayRecord([model - 0.1 * gradient]),
        "control": ArrayRecord([control + gradient]),
        "m": MetricRecord({"row": row}),
    }
    return Message(RecordDict(content), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    model, control = np.zeros(4), np.ones(4)
    for _ in range(3):
        content = RecordDict({"model": ArrayRecord([model]), "control": ArrayRecord([control])})
        replies = grid.send_and_receive([Message(content, node, "train") for node in all_nodes(grid)])
        replies = sorted((reply.content for reply in replies), key=lambda content: content["m"]["row"])
        model = np.mean([c["model"].to_numpy_ndarrays()[0] for c in replies], axis=0)
        control = np.mean([c["control"].to_numpy_ndarrays()[0] for c in replies], axis=0)
    Path(str(context.run_config["out"])).write_text(json.dumps([model.tolist(), control.tolist()]))
