"""The interface of client algorithms: what a client keeps, adds to its training, receives and sends along.

A client algorithm is a frozen dataclass of settings, as a rule is. What a client keeps between rounds is its `memory`,
tensors by name, which Corymb stores; see `memory_files`. An algorithm that only corrects gradients implements
`correction` and `remember`, on flat vectors, and can then train in blocks of clients. Any other implements `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from corymb.client.batches import Batch
from corymb.protocol.train_settings import TrainSettings

Memory = Mapping[str, Tensor]
Term = Callable[[nn.Module, Batch, Any], Tensor]  # of the module, the batch and the outputs; added to the loss


@dataclass(frozen=True)
class Correction:
    """What each step adds to the gradient of a parameter: `offset + pull * (parameter - centre)`.

    `offset` and `centre` are by the parameter's name; a missing offset is 0. A pull needs a centre.
    """

    offset: Mapping[str, Tensor] = field(default_factory=dict)
    pull: float = 0.0
    centre: Mapping[str, Tensor] = field(default_factory=dict)


class Fit(Protocol):
    """Trains a module in place on the client's batches of the round; every call draws the same batches."""

    def __call__(
        self,
        module: nn.Module,
        correction: Correction | None = None,
        term: Term | None = None,
        settings: TrainSettings | None = None,
        after_step: Callable[[Batch], None] = lambda batch: None,
    ) -> dict[str, float]:
        """Return the metrics of the training; `settings` replace those of the client."""


@dataclass
class Local:
    """A client's work on one message.

    `module` holds the received model and the client's personal entries. `start` are the received parameters, `memory`
    what the client kept, and `received` the rule's second vector by parameter name, if the rule sends one.
    `loss(module, batch)` is the loss of a module. An algorithm may put tensors into `kept`, which the client keeps for
    the next round, and into `sent` a vector for the rule, by parameter name: `cohort.steps[node][0]` for a rule whose
    `wants_batch_updates` is True.
    """

    module: nn.Module
    settings: TrainSettings
    server_round: int
    fit: Fit
    new_module: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    start: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    received: Mapping[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)

    def copy_with(self, prefix: str) -> nn.Module:
        """Return a new module like `module`, with the entries `PREFIX.name` of the memory in place of its own."""
        module = self.new_module().to(next(self.module.parameters()).device)
        module.load_state_dict({**self.module.state_dict(), **inside(prefix, self.memory)})
        return module

    def keep_model(self, prefix: str, module: nn.Module) -> None:
        """Keep the state of `module` under `PREFIX.name`."""
        self.kept |= {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in module.state_dict().items()}


def inside(prefix: str, memory: Memory) -> dict[str, Tensor]:
    """Return the entries of `memory` whose names begin with `prefix` and a dot, without these."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in memory.items() if name.startswith(start)}


@dataclass(frozen=True)
class ClientAlgorithm:
    """Base class of client algorithms. Which entries stay at the client is a setting of its own, `train.personal`.

    `trains_in_blocks` is True for an algorithm that is all in `correction` and `remember`. These two take flat vectors
    `[P]` of the shared parameters, in the model's order, or `[K, P]` for K clients at once.

    `keeps_gradients` is True if both methods are linear in their vectors, and under plain SGD the memory is a
    combination of the client's own gradients: the received vectors cancel in it. A simulation may then call the methods
    with coordinates of the vectors, of another length. A subclass has to set it again.
    """

    trains_in_blocks: ClassVar[bool] = False
    pulls: ClassVar[bool] = False  # whether `correction` returns a pull
    remembers: ClassVar[bool] = False  # whether `remember` returns something
    keeps_gradients: ClassVar[bool] = False
    needs_rule: ClassVar[str] = ""  # the rule whose second vector the algorithm needs

    def correction(self, memory: Memory, received: Tensor | None) -> tuple[Tensor | None, float]:
        """Return the offset of the gradient, None for zero, and the pull towards the received model."""
        return None, 0.0

    def remember(
        self, memory: Memory, received: Tensor | None, start: Tensor, end: Tensor, path: Tensor | float
    ) -> Memory:
        """Return the next memory after training from `start` to `end`.

        `path` is the sum of the learning rates of all steps, for K clients `[K, 1]`.
        """
        return {}

    def reports(self, settings: TrainSettings, server_round: int, steps: int) -> dict[str, float]:
        """Return the metrics that the rule needs, after `steps` steps; by default none."""
        return {}

    def examples_trained(self, settings: TrainSettings, size: int) -> int:
        """Return on how many examples a client that has `size` trains in a round, repetitions included."""
        if settings.steps is not None:
            return settings.steps * min(settings.batch_size, size)
        return size * (settings.epochs or 1)

    def train(self, local: Local) -> dict[str, float]:
        """Train `local.module` in place, and return the metrics: numbers, among them "steps", as `local.fit` does."""
        return local.fit(local.module)

    def evaluated(self, local: Local) -> nn.Module:
        """Return the module that the client evaluates: the received model with its personal entries."""
        return local.module


@dataclass(frozen=True)
class Plain(ClientAlgorithm):
    """Plain local training, as in FedAvg."""

    trains_in_blocks = True


@dataclass(frozen=True)
class FedPer(Plain):
    """Arivazhagan et al. 2019, FedPer: the last layer with parameters stays at each client.

    Other layers stay there if `train.personal` names them.
    """


@dataclass(frozen=True)
class FedBN(Plain):
    """Li et al. 2021, FedBN: the layers of batch normalisation stay at each client."""
