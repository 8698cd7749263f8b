"""Lifespans: what runs before and after each message at a client, and around the server."""

import json
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


@server.lifespan()
def around_server(context):
    steps.append("enter")
    yield
    found = [*steps, "exit"]
    Path(str(context.run_config["out"])).write_text(json.dumps(found))


@server.main()
def main(grid, context):
    replies = grid.send_and_receive([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
    steps.append(sorted(reply.content["m"]["open"] for reply in replies))
