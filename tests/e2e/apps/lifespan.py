"""Lifespans: what runs before and after each message at a client, and around the server."""

import json
import time
from pathlib import Path

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()
open_files = []
steps = []


@client.lifespan()
def around_client(context):
    open_files.append(int(context.node_config["partition-id"]))
    yield
    open_files.pop()


@client.train()
def train(message, context):
    return Message(RecordDict({"m": MetricRecord({"open": list(open_files)})}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.lifespan()
def around_server(context):
    steps.append("enter")
    yield
    found = [*steps, "exit"]
    Path(str(context.run_config["out"])).write_text(json.dumps(found))


@server.main()
def main(grid, context):
    replies = grid.send_and_receive([Message(RecordDict(), node, "train") for node in all_nodes(grid)])
    steps.append(sorted(reply.content["m"]["open"] for reply in replies))
