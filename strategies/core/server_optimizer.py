"""Server optimisers: the step that the server takes from the old model towards the rule's result."""

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
class OptimizerState:
    """The state of a server optimiser between rounds: its tensors and numbers by name."""

    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerOptimizer:
    """Reddi et al. 2021, FedOpt: an optimiser of torch, applied to the pseudo-gradient `old model - new model`.

    `optimizer` is the name of a class in `torch.optim`, or "Yogi"; `options` are its keyword arguments. FedAvgM is
    SGD with `{"momentum": 0.9}`, FedAdam is Adam, FedAdagrad is Adagrad, FedYogi is Yogi. torch's Adam corrects its
    bias, the Adam of the paper does not. Buffers are taken from the rule's result. A round that leaves the model
    unchanged makes no step. The optimiser does not check the rule's result: if the rule is not robust, the effect of
    a hostile update stays in the optimiser's state.
    """

    optimizer: str = "SGD"
    learning_rate: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(learning_rate=self.learning_rate)
        try:
            vector = torch.zeros(1, requires_grad=True)
            vector.grad = torch.zeros(1)
            self._build(vector).step()  # fails for optimisers that need a closure or sparse gradients
        except Exception as error:  # torch raises exceptions of many types
            raise ValueError(
                f"The server optimiser {self.optimizer!r} cannot be used with options {self.options}: {error}."
            ) from None

    def initial(self) -> OptimizerState:
        """Return the optimiser's state before the first step."""
        return OptimizerState()

    def step(self, old: Model, new: Model, moments: OptimizerState) -> tuple[Model, OptimizerState]:
        """Return the model after one step from `old` towards `new`, and the optimiser's state after the step."""
        if new is old or torch.equal(new.parameters, old.parameters):
            return new, moments
        vector = old.parameters.clone().requires_grad_()
        optimizer = self._build(vector)
        if moments.values:
            state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in moments.values.items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        vector.grad = old.parameters - new.parameters
        optimizer.step()
        values = {name: v for name, v in optimizer.state[vector].items() if v is not None}
        return replace(new, parameters=vector.detach()), OptimizerState(values)

    def _build(self, vector: Tensor) -> torch.optim.Optimizer:
        optimizer_class = Yogi if self.optimizer == "Yogi" else getattr(torch.optim, self.optimizer)
        optimizer: torch.optim.Optimizer = optimizer_class([vector], lr=self.learning_rate, **self.options)
        return optimizer
