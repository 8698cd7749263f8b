"""Attacks by hostile clients that know one another's updates: each waits until all of them have trained.

Like the attackers in the papers, they know nothing of the honest clients, and estimate their updates from their own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isnan
from statistics import NormalDist
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from pydantic import Field
from torch import Tensor

from corymb.client.app import round_of
from corymb.client.seeds import derive_seed
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import STEPS, of_kind
from corymb.protocol.settings import Settings
from corymb.simulations.data.clients import Client, CohortTrainer, IndexedReplies, Request

State = dict[str, Tensor]


class ColludingAttack(Settings):
    """Model attack: the hostile clients of a round put their updates together, and send a model made from them."""

    clients: int = Field(0, ge=0)
    """The number of hostile clients, drawn by the seed."""

    def update(self, updates: Tensor, clients: int, random: torch.Generator) -> Tensor:
        """Return the update `[P]` that the hostile clients send. `updates [M, P]` are those of their own training.

        `clients` is the number of all clients that train in this round.
        """
        raise NotImplementedError

    def wrap(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """Return `app` with the attack. Raises `ValueError` if it cannot train the clients of a round in one call."""
        if not isinstance(app, CohortTrainer):
            raise ValueError(
                f"attack.kind = {self.kind!r} needs all hostile clients of a round in one process; "  # type: ignore[attr-defined]
                'use engine = "auto" or another attack.'
            )
        attackers = set(hostile)
        train_all = app.train_together

        class Colluding:
            def __call__(self, message: Message, context: Context) -> Message:
                return app(message, context)  # an evaluation, which is honest

            def train_together(self, requests: Sequence[Request]) -> IndexedReplies:
                return collude(train_all(requests), requests)

        def collude(replies: IndexedReplies, requests: Sequence[Request]) -> IndexedReplies:
            held: list[tuple[int, Message]] = []
            for index, reply in replies:
                is_hostile = int(requests[index][1].node_config["partition-id"]) in attackers
                if is_hostile and isinstance(reply, Message) and not reply.has_error():
                    held.append((index, reply))
                else:
                    yield index, reply
                del reply  # free its model before the next one is trained
            held.sort(key=lambda pair: pair[0])
            yield from zip((index for index, _ in held), self._changed(held, requests, seed), strict=True)

        return Colluding()

    def _changed(self, held: list[tuple[int, Message]], requests: Sequence[Request], seed: int) -> list[Message]:
        """Return the replies that are sent in place of those that are `held`."""
        if not held:
            return []
        received = [to_state(of_kind(requests[index][0].content, ArrayRecord)[0]) for index, _ in held]
        trained = [to_state(of_kind(reply.content, ArrayRecord)[0]) for _, reply in held]
        names = [name for name, t in trained[0].items() if t.is_floating_point() and ".running_" not in f".{name}"]
        updates = torch.stack(
            [torch.cat([(t[n] - r[n]).flatten() for n in names]) for r, t in zip(received, trained, strict=True)]
        )
        server_round = round_of(of_kind(requests[held[0][0]][0].content, ConfigRecord))
        random = torch.Generator().manual_seed(derive_seed(seed, server_round, "collusion"))
        update = self.update(updates, len(requests), random)
        pieces = dict(zip(names, update.split([trained[0][n].numel() for n in names]), strict=True))
        changed = []
        for (index, reply), before, after in zip(held, received, trained, strict=True):
            sent = {n: before[n] + pieces[n].view_as(t) if n in pieces else t for n, t in after.items()}
            records = {
                n: to_arrays(sent) if isinstance(r, ArrayRecord) and n != STEPS else r for n, r in reply.content.items()
            }
            changed.append(Message(RecordDict(records), reply_to=requests[index][0]))
        return changed


class ALittleIsEnough(ColludingAttack):
    """Baruch et al. 2019, "A Little Is Enough", Algorithm 3: the mean of the updates minus z standard deviations.

    z is the largest shift that a majority of honest clients hides: with N clients, M of them hostile, the quantile of
    the normal distribution at (N - M - s) / (N - M), where s = floor(N / 2 + 1) - M. `deviations` sets z by hand.
    """

    kind: Literal["alie"] = "alie"
    deviations: float = Field(float("nan"))
    """z, the number of standard deviations; nan: the paper's choice."""

    def update(self, updates: Tensor, clients: int, random: torch.Generator) -> Tensor:
        """See `ColludingAttack.update`."""
        z = self.deviations if not isnan(self.deviations) else largest_hidden_shift(clients, len(updates))
        return updates.mean(dim=0) - z * updates.std(dim=0, correction=0)


class InnerProduct(ColludingAttack):
    """Xie et al. 2019, "Fall of Empires": minus `scale` times the mean update, so that the sum may point backwards."""

    kind: Literal["ipm"] = "ipm"
    scale: float = Field(0.5, gt=0)
    """The factor, epsilon in the paper: below 1 it deceives the distances of Krum, above 1 it turns the mean."""

    def update(self, updates: Tensor, clients: int, random: torch.Generator) -> Tensor:
        """See `ColludingAttack.update`."""
        return -self.scale * updates.mean(dim=0)


class Copies(ColludingAttack):
    """Colluding copies (Sybils): all hostile clients send the same Gaussian noise of standard deviation `scale`."""

    kind: Literal["copies"] = "copies"
    scale: float = Field(1.0, gt=0)
    """The standard deviation of the noise."""

    def update(self, updates: Tensor, clients: int, random: torch.Generator) -> Tensor:
        """See `ColludingAttack.update`."""
        return self.scale * torch.randn(updates.shape[1], generator=random).to(updates.dtype)


def largest_hidden_shift(clients: int, hostile: int) -> float:
    """Return z of ALIE for this many clients, of which `hostile` are; 0 if there are too few honest clients."""
    honest = clients - hostile
    supporters = max(1, clients // 2 + 1 - hostile)
    return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest)) if supporters < honest else 0.0
