"""Clients that begin from models of their own instead of the server's."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import nn

from corymb.client.app import round_of
from corymb.protocol.codec import to_arrays
from corymb.protocol.records import of_kind


class OwnStart:
    """`app`, whose clients each get another random model in the first round, whatever the server sent."""

    def __init__(self, app: Any, model: Callable[[], nn.Module], seed: int) -> None:
        self._app, self._model, self._seed = app, model, seed
        if hasattr(app, "together"):
            self.together = lambda asked: app.together([(self._own(*pair), pair[1]) for pair in asked])

    def __call__(self, message: Message, context: Context) -> Message:
        """The app's reply."""
        reply: Message = self._app(self._own(message, context), context)
        return reply

    def _own(self, message: Message, context: Context) -> Message:
        trains = message.metadata.message_type.startswith("train")
        if trains and round_of(of_kind(message.content, ConfigRecord)) == 1:
            with torch.random.fork_rng(devices=[]):
                client = int(context.node_config["partition-id"])
                torch.default_generator.manual_seed(1_000_003 * (self._seed + 1) + client)
                state = self._model().state_dict()
            content = message.content.copy()
            for name, record in content.items():
                if isinstance(record, ArrayRecord):
                    content[name] = to_arrays(state)
            own = copy(message)
            own.content = content
            return own
        return message
