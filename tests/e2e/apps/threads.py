"""A server with several threads, each of which talks to one node."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    row, number = int(context.node_config["partition-id"]), int(message.content["config"]["number"])
    calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
    context.state["calls"] = MetricRecord({"n": calls})
    metrics = MetricRecord({"row": row, "sum": row + 10 * number + 100 * calls})
    return Message(RecordDict({"m": metrics}), reply_to=message)


def all_nodes(grid):
    while len(nodes := list(grid.get_node_ids())) < 3:  # Flower registers nodes while the server runs
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid, context):
    nodes = all_nodes(grid)

    def talk(node):
        found = []
        for number in range(4):
            message = Message(RecordDict({"config": ConfigRecord({"number": number})}), node, "train")
            (reply,) = grid.send_and_receive([message])
            found.append([reply.content["m"]["row"], reply.content["m"]["sum"]])
        return found

    with ThreadPoolExecutor(len(nodes)) as pool:
        found = sorted(pool.map(talk, nodes))
    Path(str(context.run_config["out"])).write_text(json.dumps(found))
