"""Arrays of integers, booleans and half precision, scalars and empty arrays."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    row = int(context.node_config["partition-id"])
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    arrays["counts"] += row
    arrays["flags"][row % 3] = True
    sent = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    return Message(RecordDict({"arrays": sent, "m": MetricRecord({"row": row})}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    arrays = {
        "counts": np.arange(4, dtype=np.int64) * 2**40,
        "flags": np.zeros(3, dtype=bool),
        "half": np.array([0.1, 2.5], dtype=np.float16),
        "scalar": np.array(3, dtype=np.uint8),
        "empty": np.zeros((0, 2), dtype=np.float32),
    }
    content = RecordDict({"arrays": ArrayRecord({name: Array(values) for name, values in arrays.items()})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in all_nodes(grid)])
    found = sorted(
        [r.content["m"]["row"], [[n, a.dtype, a.numpy().tolist()] for n, a in sorted(r.content["arrays"].items())]]
        for r in replies
    )
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
