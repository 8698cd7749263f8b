"""Messages that nobody pulls still reach their nodes, in order."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    before = context.state["sum"]["value"] if "sum" in context.state else 0
    context.state["sum"] = MetricRecord({"value": before + int(message.content["config"]["add"])})
    return Message(RecordDict({"m": MetricRecord({"value": context.state["sum"]["value"]})}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    nodes = all_nodes(grid)
    grid.push_messages([Message(RecordDict({"config": ConfigRecord({"add": 5})}), node, "train") for node in nodes])
    time.sleep(15)  # Ray starts meanwhile
    replies = grid.send_and_receive(
        [Message(RecordDict({"config": ConfigRecord({"add": 2})}), node, "train") for node in nodes]
    )
    found = sorted(reply.content["m"]["value"] for reply in replies)
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
