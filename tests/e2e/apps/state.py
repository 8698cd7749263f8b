"""State in the Context: it lasts from round to round, but not what a failed call has written."""

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
    row, number = int(context.node_config["partition-id"]), int(message.content["config"]["round"])
    if "kept" not in context.state:
        context.state["kept"] = MetricRecord({"calls": 0})
    context.state["kept"]["calls"] += 1
    if row == 1 and number == 2:
        raise RuntimeError("no data today")
    calls = context.state["kept"]["calls"]
    return Message(RecordDict({"m": MetricRecord({"row": row, "calls": calls})}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    found = []
    for number in (1, 2, 3):
        content = RecordDict({"config": ConfigRecord({"round": number})})
        replies = grid.send_and_receive([Message(content, node, "train") for node in all_nodes(grid)])
        found.append(sorted((r.content["m"]["row"], r.content["m"]["calls"]) for r in replies if r.has_content()))
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
