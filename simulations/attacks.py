"""What hostile or broken clients of a simulation do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from corymb.client.app import round_of, seed_of, site_of
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind

Client = Callable[[Message, Context], Message]
State = dict[str, Tensor]


def shuffled_labels(targets: Tensor, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
    """The targets of `rows [n]` in a random order: examples whose labels mean nothing."""
    return targets[torch.from_numpy(rng.permutation(rows))]


class Attackers:
    """A client app whose clients at `rows` send other models than they trained; the others answer for themselves.

    They tell the truth when they evaluate, also for a guard.

    "noise" sends the received model with normal noise of deviation `scale`; "opposite" goes `scale` times as far
    in the opposite direction; "reversed" multiplies the last layer, and with it all scores, by `-scale`.
    """

    def __init__(self, app: Client, kind: str, rows: Collection[int], scale: float, seed: int) -> None:
        self._app, self._kind, self._rows, self._scale = app, kind, set(rows), scale
        self._seed = seed
        if hasattr(app, "together"):
            self.together = self._together

    def __call__(self, message: Message, context: Context) -> Message:
        """The app's reply, or what an attacker makes of it."""
        return self._changed(message, context, self._app(message, context))

    def _together(self, asked: list[tuple[Message, Context]]) -> Iterator[tuple[int, Message | Exception]]:
        for number, reply in self._app.together(asked):  # type: ignore[attr-defined]  # it has it, or this would not be
            message, context = asked[number]
            yield number, self._changed(message, context, reply) if isinstance(reply, Message) else reply

    def _changed(self, message: Message, context: Context, reply: Message) -> Message:
        if int(context.node_config["partition-id"]) not in self._rows or not of_kind(reply.content, ArrayRecord):
            return reply
        received = to_state(of_kind(message.content, ArrayRecord)[0])
        server_round = round_of(of_kind(message.content, ConfigRecord))
        self._random = torch.Generator().manual_seed(seed_of(self._seed, site_of(context), server_round, "attack"))
        content = RecordDict(
            {
                name: to_arrays(self._sent(received, to_state(record)))
                if isinstance(record, ArrayRecord) and set(record) == set(received)
                else record
                for name, record in reply.content.items()
            }
        )
        return Message(content, reply_to=message)

    def _sent(self, received: State, trained: State) -> State:
        last = next(reversed(trained)).rpartition(".")[0]
        return {
            name: self._tensor(received[name], tensor, name.rpartition(".")[0] == last)
            for name, tensor in trained.items()
        }

    def _tensor(self, received: Tensor, trained: Tensor, is_last: bool) -> Tensor:
        if not trained.is_floating_point():
            return trained
        if self._kind == "reversed":
            return -self._scale * trained if is_last else trained
        if self._kind == "noise":
            return received + self._scale * torch.randn(received.shape, generator=self._random).to(received.dtype)
        return received - self._scale * (trained - received)
