"""Client layers: layers with one set of weights per client, for K clients whose batches are concatenated.

Layers without parameters, such as ReLU or pooling, are not replaced, because they process examples independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corymb.simulations.engine.weight_forms import DenseWeights, WeightForm, as_dtype, first_rows


@dataclass
class StepContext:
    """The state of the current step, shared by all client layers of a module."""

    use_patches: bool = False  # for convolutions: on a GPU, where one kernel launch per client is too small
    precision: torch.dtype | None = None  # the dtype to convert the inputs of client layers to; None: leave them
    clients: int = 1  # number of clients that still train
    rate: float | None = None  # learning rate of plain SGD; None: leave gradients for an optimiser
    lengths: list[int] = field(default_factory=list)  # examples in each client's batch; the rest is padding
    generators: Sequence[torch.Generator] = ()  # each client's source of random numbers


class _ApplyLayer(torch.autograd.Function):
    """Makes a client layer part of an autograd graph; in the backward pass the layer updates its own weights."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        outputs, ctx.saved = layer.outputs(inputs, inputs.requires_grad)
        result: Tensor = outputs.clone()  # the outputs may be a view, which later layers could not change in place
        return result

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Any:
        return ctx.layer.backward(gradients, ctx.saved, ctx.needs_input_grad[0]), None, None


class ClientLayer(nn.Module):
    """A layer with parameters for each client: `form` stores the weights, `bias` the bias unless `form` does."""

    def __init__(self, original: nn.Module, context: StepContext) -> None:
        super().__init__()
        self.context = context
        self.form: Any = None
        self.bias: DenseWeights | None = None
        self._anchor = torch.zeros(1, requires_grad=True)  # makes autograd run backward through the first layer too

    def start_block(self, form: Any, bias: DenseWeights | None) -> None:
        """Set the parameters of a new block of clients."""
        self.form, self.bias = form, bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of all clients, `[K * B, ...]`."""
        result: Tensor = _ApplyLayer.apply(inputs, self._anchor, self)  # type: ignore[no-untyped-call]
        return result

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Tensor, Any]:
        """Return the outputs and what `backward` needs; the caller passes the same flag to `backward`."""
        raise NotImplementedError

    def backward(self, gradients: Tensor, saved: Any, needs_input_gradients: bool) -> Any:
        """Update the weights from the gradients of the outputs; return those of the inputs, or None if not needed."""
        raise NotImplementedError

    def cast(self, inputs: Tensor) -> Tensor:
        """Return `inputs` in the precision of the step."""
        return inputs if self.context.precision is None else inputs.to(self.context.precision)

    def apply_bias_gradients(self, gradients: Tensor) -> None:
        """Update the bias, if there is one, from the gradients `[K, B, out]` of the outputs."""
        if self.bias is not None:
            self.bias.apply_weight_gradient(gradients.sum(dim=1), self.context.rate)


class ClientLinear(ClientLayer):
    """`nn.Linear` with one set of weights per client, in any weight form."""

    form: WeightForm

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Tensor, tuple[Tensor, torch.dtype]]:
        """See `ClientLayer.outputs`."""
        rows = self.cast(inputs.reshape(self.context.clients, -1, inputs.shape[-1]))
        outputs = self.form.outputs(rows)
        if self.bias is not None:
            outputs = outputs.add_(first_rows(self.context.clients, self.bias.weight).unsqueeze(1))
        return outputs.reshape(*inputs.shape[:-1], -1), (rows, inputs.dtype)

    def backward(
        self, gradients: Tensor, saved: tuple[Tensor, torch.dtype], needs_input_gradients: bool
    ) -> Tensor | None:
        """See `ClientLayer.backward`."""
        rows, dtype = saved
        by_client = gradients.reshape(self.context.clients, -1, gradients.shape[-1])
        result = (
            as_dtype(self.form.input_gradients(by_client).reshape(*gradients.shape[:-1], -1), dtype)
            if needs_input_gradients
            else None
        )
        self.form.apply_gradients(by_client, rows, self.context.rate)
        self.apply_bias_gradients(by_client)
        return result


class ClientDropout(nn.Module):
    """Dropout that draws for each client the numbers that the client would draw if it trained alone."""

    def __init__(self, original: nn.Dropout, context: StepContext) -> None:
        super().__init__()
        self.p, self.context = original.p, context

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs [K * B, ...]` with a share `p` set to zero and the rest scaled up."""
        if not self.training or self.p == 0:
            return inputs
        scale = torch.zeros_like(inputs)
        by_client = scale.unflatten(0, (self.context.clients, -1))
        for target, length, generator in zip(by_client, self.context.lengths, self.context.generators, strict=False):
            if length:  # zero for a client that has finished
                drawn = torch.empty(target[:length].shape, dtype=inputs.dtype).bernoulli_(
                    1 - self.p, generator=generator
                )
                target[:length] = drawn.div_(1 - self.p)
        return inputs * scale
