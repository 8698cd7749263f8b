"""Clients that begin from random models of their own instead of the server's."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import nn

from corymb.client.app import round_of
from corymb.protocol.codec import to_arrays
from corymb.protocol.records import of_kind
from corymb.simulations.data.clients import Client, changed


def with_random_start(app: Client, model: Callable[[], nn.Module], seed: int) -> Client:
    """`app`, whose clients each train another random `model()` in the first round, whatever the server sent."""

    def request(message: Message, context: Context) -> Message:
        trains = message.metadata.message_type.startswith("train")
        if not trains or round_of(of_kind(message.content, ConfigRecord)) != 1:
            return message
        with torch.random.fork_rng(devices=[]):
            client = int(context.node_config["partition-id"])
            torch.default_generator.manual_seed(1_000_003 * (seed + 1) + client)
            state = model().state_dict()
        own = copy(message)
        own.content = message.content.copy()
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                own.content[name] = to_arrays(state)
        return own

    return changed(app, request=request)
