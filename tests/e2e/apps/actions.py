"""Custom actions, and a node that does not know one of them."""

import json
import time
from pathlib import Path

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


def answer(message, context, value):
    row = int(context.node_config["partition-id"])
    return Message(RecordDict({"m": MetricRecord({"row": row, "value": value})}), reply_to=message)


@client.train("fast")
def fast(message, context):
    return answer(message, context, 1)


@client.train()
def slow(message, context):
    return answer(message, context, 2)


@client.query("size")
def size(message, context):
    return answer(message, context, 3)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    found = []
    for kind in ("train.fast", "train", "query.size", "query.missing"):
        messages = [Message(RecordDict(), node, kind) for node in all_nodes(grid)]
        replies = grid.send_and_receive(messages)
        values = sorted((r.content["m"]["row"], r.content["m"]["value"]) for r in replies if r.has_content())
        found.append([kind, values, sum(r.has_error() for r in replies)])
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
