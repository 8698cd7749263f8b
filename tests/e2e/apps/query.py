"""Queries: the server asks every node for its numbers and sums them."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message, context):
    factor = int(message.content["config"]["factor"])
    row = int(context.node_config["partition-id"])
    return Message(RecordDict({"m": MetricRecord({"row": row, "product": factor * row})}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    content = RecordDict({"config": ConfigRecord({"factor": 7})})
    messages = [Message(content, node, MessageType.QUERY) for node in all_nodes(grid)]
    replies = grid.send_and_receive(messages)
    found = sorted((r.content["m"]["row"], r.content["m"]["product"]) for r in replies)
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
