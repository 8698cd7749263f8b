"""What hostile or broken clients of a simulation do."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from torch import Tensor

from corymb.client.app import round_of, seed_of, site_of
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind
from corymb.protocol.settings import Settings
from corymb.simulations.data.clients import Client, changed
from corymb.simulations.data.kinds import with_kind

State = dict[str, Tensor]
Change = Callable[[State, State, torch.Generator], State]  # received, trained -> sent


class ShuffledLabels(Settings):
    """The labels of the hostile `clients`, drawn by the seed, are in a random order."""

    kind: Literal["shuffled_labels"] = "shuffled_labels"
    clients: int = Field(0, ge=0)

    def around(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """The same app: its clients are honest, their labels are not."""
        return app


class ModelAttack(Settings):
    """What hostile clients send instead of the models that they trained. They tell the truth when they evaluate."""

    clients: int = Field(0, ge=0)
    scale: float = Field(1.0, gt=0)

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """What a hostile client sends."""
        raise NotImplementedError

    def around(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """`app`, whose clients with numbers in `hostile` send other models than they trained."""
        rows = set(hostile)

        def reply(message: Message, context: Context, reply: Message) -> Message:
            if int(context.node_config["partition-id"]) not in rows or not of_kind(reply.content, ArrayRecord):
                return reply
            received = to_state(of_kind(message.content, ArrayRecord)[0])
            server_round = round_of(of_kind(message.content, ConfigRecord))
            random = torch.Generator().manual_seed(seed_of(seed, site_of(context), server_round, "attack"))
            content = RecordDict(
                {
                    name: to_arrays(self.change(received, to_state(record), random))
                    if isinstance(record, ArrayRecord) and set(record) == set(received)
                    else record
                    for name, record in reply.content.items()
                }
            )
            return Message(content, reply_to=message)

        return changed(app, reply=reply)


class GaussianNoise(ModelAttack):
    """The received model with normal noise of deviation `scale`."""

    kind: Literal["gaussian"] = "gaussian"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack`."""
        return {
            name: received[name] + self.scale * torch.randn(tensor.shape, generator=random).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in trained.items()
        }


class SignFlip(ModelAttack):
    """The opposite of the update, `scale` times as far."""

    kind: Literal["sign_flip"] = "sign_flip"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack`."""
        return {
            name: received[name] - self.scale * (tensor - received[name]) if tensor.is_floating_point() else tensor
            for name, tensor in trained.items()
        }


class ReversedScores(ModelAttack):
    """The trained model whose last layer, and with it every score, is multiplied by `-scale`."""

    kind: Literal["reversed_scores"] = "reversed_scores"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack`."""
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
    """The targets of `rows [n]` in a random order: examples whose labels mean nothing."""
    return targets[torch.from_numpy(rng.permutation(rows))]
