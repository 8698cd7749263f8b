"""Mods around all messages and around one function."""

import json
import time
from pathlib import Path

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp


def doubled(message, context, call_next):
    reply = call_next(message, context)
    reply.content["m"]["value"] *= 2
    return reply


def plus_one(message, context, call_next):
    reply = call_next(message, context)
    reply.content["m"]["value"] += 1
    return reply


client = ClientApp(mods=[doubled])
server = ServerApp()


@client.train(mods=[plus_one])
def train(message, context):
    row = int(context.node_config["partition-id"])
    return Message(RecordDict({"m": MetricRecord({"value": 10 * row})}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    replies = grid.send_and_receive([Message(RecordDict(), node, "train") for node in all_nodes(grid)])
    found = sorted(reply.content["m"]["value"] for reply in replies)
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
