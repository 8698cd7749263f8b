"""Attacks by hostile or faulty clients of a simulation."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from torch import Tensor

from corymb.client.app import client_identity, derive_seed, round_of
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind
from corymb.protocol.settings import Settings
from corymb.simulations.data.clients import Client, with_hooks
from corymb.simulations.data.kinds import with_kind

State = dict[str, Tensor]


class ShuffledLabels(Settings):
    """Label attack: the labels of `clients` hostile clients, drawn by the seed, are in random order.

    The scenario shuffles the labels; the clients themselves train and reply as honest clients do.
    """

    kind: Literal["shuffled_labels"] = "shuffled_labels"
    clients: int = Field(0, ge=0)
    """The number of hostile clients, drawn by the seed."""

    def wrap(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """Return `app` unchanged: the attack is in the labels, not in the replies."""
        return app


class ModelAttack(Settings):
    """Model attack: hostile clients train honestly but send a different model. Their evaluations are honest."""

    clients: int = Field(0, ge=0)
    """The number of hostile clients, drawn by the seed."""
    scale: float = Field(1.0, gt=0)
    """The strength of the attack."""

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """Return the state that a hostile client sends instead of the state that it `trained`."""
        raise NotImplementedError

    def wrap(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """Return `app` with a hook that changes the models sent by the clients whose numbers are in `hostile`."""
        attackers = set(hostile)

        def reply(message: Message, context: Context, reply: Message) -> Message:
            if int(context.node_config["partition-id"]) not in attackers or not of_kind(reply.content, ArrayRecord):
                return reply
            received = to_state(of_kind(message.content, ArrayRecord)[0])
            server_round = round_of(of_kind(message.content, ConfigRecord))
            random = torch.Generator().manual_seed(derive_seed(seed, client_identity(context), server_round, "attack"))
            content = RecordDict(
                {
                    name: to_arrays(self.change(received, to_state(record), random))
                    if isinstance(record, ArrayRecord) and set(record) == set(received)
                    else record
                    for name, record in reply.content.items()
                }
            )
            return Message(content, reply_to=message)

        return with_hooks(app, reply=reply)


class GaussianNoise(ModelAttack):
    """Hostile clients send the received model plus Gaussian noise of standard deviation `scale`."""

    kind: Literal["gaussian"] = "gaussian"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack.change`."""
        return {
            name: received[name] + self.scale * torch.randn(tensor.shape, generator=random).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in trained.items()
        }


class SignFlip(ModelAttack):
    """Hostile clients send `received - scale * (trained - received)`: their update with the opposite sign."""

    kind: Literal["sign_flip"] = "sign_flip"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack.change`."""
        return {
            name: received[name] - self.scale * (tensor - received[name]) if tensor.is_floating_point() else tensor
            for name, tensor in trained.items()
        }


class ReversedScores(ModelAttack):
    """Hostile clients multiply the last layer of the trained model, and so all class scores, by `-scale`."""

    kind: Literal["reversed_scores"] = "reversed_scores"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack.change`."""
        last = next(reversed(trained)).rpartition(".")[0]
        return {
            name: -self.scale * tensor if tensor.is_floating_point() and name.rpartition(".")[0] == last else tensor
            for name, tensor in trained.items()
        }


AttackSettings = Annotated[
    ShuffledLabels | GaussianNoise | SignFlip | ReversedScores,
    Field(discriminator="kind"),
    BeforeValidator(with_kind("shuffled_labels")),
]


def shuffled_labels(targets: Tensor, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
    """Return the targets of `rows [n]` in random order, `[n]`."""
    return targets[torch.from_numpy(rng.permutation(rows))]
