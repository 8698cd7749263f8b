"""Clients that start from their own random models instead of the server's model."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import nn

from corymb.client.app import round_of
from corymb.protocol.codec import to_arrays
from corymb.protocol.records import of_kind
from corymb.simulations.data.clients import Client, with_hooks


def with_random_start(app: Client, model: Callable[[], nn.Module], seed: int) -> Client:
    """Return `app` with a hook: in round 1, each client trains its own random `model()`, not the server's model."""

    def request(message: Message, context: Context) -> Message:
        trains = message.metadata.message_type.startswith("train")
        if not trains or round_of(of_kind(message.content, ConfigRecord)) != 1:
            return message
        with torch.random.fork_rng(devices=[]):
            client = int(context.node_config["partition-id"])
            torch.default_generator.manual_seed(1_000_003 * (seed + 1) + client)
            state = model().state_dict()
        changed = copy(message)
        changed.content = message.content.copy()
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                changed.content[name] = to_arrays(state)
        return changed

    return with_hooks(app, request=request)
