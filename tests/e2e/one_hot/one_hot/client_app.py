"""A site raises its own number for the round, so that the mean over all sites raises it by one."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from corymb.client.memory import answer_from_memory

SITES = 3
app = ClientApp(mods=[answer_from_memory])


@app.train()
def train(message: Message, context: Context) -> Message:
    site, folder = int(context.node_config["partition-id"]), Path(str(context.node_config["folder"]))
    sent: Any = message.content
    number = sent["config"]["server-round"]
    with (folder / f"trained-{site}.log").open("a") as log:
        log.write(f"{number}\n")
    delay = folder / f"delay-{site}"  # a test writes the seconds that this site takes
    if delay.exists():
        time.sleep(float(delay.read_text()))
    counts = sent["arrays"]["counts"].numpy().copy()
    counts[number - 1, site] += SITES
    padding = sent["arrays"]["padding"].numpy() + np.float32(site)  # differs from site to site, so that each is sent
    arrays = ArrayRecord({"counts": Array(counts), "padding": Array(padding)})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
