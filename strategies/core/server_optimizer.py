"""Server optimisers: how far to go in the direction that a rule points to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corymb.strategies.core.layout import Model
from corymb.strategies.core.validation import positive
from corymb.strategies.core.yogi import Yogi


@dataclass(frozen=True)
class Moments:
    """An optimiser's state between rounds: its tensors and numbers by name."""

    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerOptimizer:
    """Reddi et al. 2021, FedOpt: any optimiser of torch on the pseudo-gradient `old model - new model`.

    `optimizer` is a class of `torch.optim`, or "Yogi"; `options` are its own. FedAvgM is SGD with `{"momentum": 0.9}`,
    FedAdam is Adam, FedAdagrad is Adagrad, FedYogi is Yogi. torch's Adam corrects its bias, the paper's does not.
    Buffers are the rule's. A round that leaves the model as it was makes no step. The optimiser trusts the rule: what
    a rule that is not robust lets through stays in the moments.
    """

    optimizer: str = "SGD"
    learning_rate: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(learning_rate=self.learning_rate)
        try:
            vector = torch.zeros(1, requires_grad=True)
            vector.grad = torch.zeros(1)
            self._made(vector).step()  # some want a closure, or another kind of gradient
        except Exception as error:  # torch raises whatever it likes
            raise ValueError(f"torch.optim cannot make {self.optimizer!r} with {self.options}: {error}.") from None

    def initial(self) -> Moments:
        """Before the first step."""
        return Moments()

    def step(self, old: Model, new: Model, moments: Moments) -> tuple[Model, Moments]:
        """The model after one step from `old` towards `new`, and the moments after it."""
        if new is old or torch.equal(new.parameters, old.parameters):
            return new, moments
        vector = old.parameters.clone().requires_grad_()
        optimizer = self._made(vector)
        if moments.values:
            state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in moments.values.items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        vector.grad = old.parameters - new.parameters
        optimizer.step()
        values = {name: v for name, v in optimizer.state[vector].items() if v is not None}
        return replace(new, parameters=vector.detach()), Moments(values)

    def _made(self, vector: Tensor) -> torch.optim.Optimizer:
        kind = Yogi if self.optimizer == "Yogi" else getattr(torch.optim, self.optimizer)
        made: torch.optim.Optimizer = kind([vector], lr=self.learning_rate, **self.options)
        return made
