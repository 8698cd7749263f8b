"""Attacks by hostile or faulty clients of a simulation, each in what it sends. Other files have further kinds.

A hostile client trains honestly and then sends something else. Its evaluations are honest.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from pydantic import BeforeValidator, Field
from torch import Tensor

from corymb.client.app import client_identity, round_of
from corymb.client.seeds import derive_seed
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import EXAMPLES, STEPS, of_kind
from corymb.protocol.settings import Settings
from corymb.simulations.data.clients import Client, with_hooks
from corymb.simulations.data.colluding_attacks import ALittleIsEnough, Copies, InnerProduct
from corymb.simulations.data.data_attacks import Backdoor, FlippedLabels, ShuffledLabels
from corymb.simulations.data.kinds import with_kind

State = dict[str, Tensor]


class ModelAttack(Settings):
    """Model attack: hostile clients train honestly but send a different model."""

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
                    if isinstance(record, ArrayRecord) and name != STEPS
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
        return _along_the_update(received, trained, -self.scale)


class Scaling(ModelAttack):
    """Hostile clients send their update times `scale`, so that it outweighs the others (model replacement)."""

    kind: Literal["scaling"] = "scaling"
    scale: float = Field(10.0, gt=0)
    """The factor."""

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack.change`."""
        return _along_the_update(received, trained, self.scale)


class Replay(ModelAttack):
    """Hostile clients send back the model that they received, as free riders do. `scale` has no effect."""

    kind: Literal["replay"] = "replay"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack.change`."""
        return received


class NotANumber(ModelAttack):
    """Hostile or broken clients send NaN in place of every parameter. `scale` has no effect."""

    kind: Literal["nan"] = "nan"

    def change(self, received: State, trained: State, random: torch.Generator) -> State:
        """See `ModelAttack.change`."""
        return {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in trained.items()}


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


class InflatedWeight(Settings):
    """Hostile clients claim `scale` times as many examples as they have; their models are honest."""

    kind: Literal["inflated_weight"] = "inflated_weight"
    clients: int = Field(0, ge=0)
    """The number of hostile clients, drawn by the seed."""
    scale: float = Field(1000.0, gt=0)
    """The factor."""

    def wrap(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """Return `app` with a hook that raises the numbers of examples of the `hostile` clients."""
        attackers = set(hostile)

        def reply(message: Message, context: Context, reply: Message) -> Message:
            if int(context.node_config["partition-id"]) in attackers and of_kind(reply.content, ArrayRecord):
                for metrics in of_kind(reply.content, MetricRecord):
                    if isinstance(claimed := metrics.get(EXAMPLES), (int, float)):
                        metrics[EXAMPLES] = round(self.scale * claimed)
            return reply

        return with_hooks(app, reply=reply)


AttackSettings = Annotated[
    ShuffledLabels
    | FlippedLabels
    | Backdoor
    | GaussianNoise
    | SignFlip
    | Scaling
    | Replay
    | NotANumber
    | ReversedScores
    | InflatedWeight
    | ALittleIsEnough
    | InnerProduct
    | Copies,
    Field(discriminator="kind"),
    BeforeValidator(with_kind("shuffled_labels")),
]


def _along_the_update(received: State, trained: State, factor: float) -> State:
    return {
        name: received[name] + factor * (tensor - received[name]) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }
