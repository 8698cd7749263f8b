"""Layers of which each client has its own, for modules whose batch holds the batches of K clients one after another.

Whatever has no parameters, like a rectifier or pooling, need not know: it treats every example by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corymb.simulations.engine.weight_forms import DenseWeights, WeightForm, as_type, upto


@dataclass
class StepContext:
    """What the layers of a module have to know of the step that they are in."""

    as_patches: bool = False  # convolutions as products of matrices: on a GPU, where a kernel per client is too small
    precision: torch.dtype | None = None  # to which inputs of layers with parameters are rounded, if they are
    clients: int = 1  # that still train
    rate: float | None = None  # of plain SGD; None: leave gradients for an optimiser
    lengths: list[int] = field(default_factory=list)  # examples in each client's batch; the rest is padding
    generators: Sequence[torch.Generator] = ()  # what each client draws from


class _Applied(torch.autograd.Function):
    """Output of a client layer; on the way back the layer learns by itself."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, hook: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        outputs, ctx.kept = layer.outputs(inputs, inputs.requires_grad)
        result: Tensor = outputs.clone()  # no view, which nothing could change in place
        return result

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Any:
        return ctx.layer.back(slopes, ctx.kept, ctx.needs_input_grad[0]), None, None


class ClientLayer(nn.Module):
    """A layer with parameters; `begin` gives each block of clients new ones."""

    def __init__(self, original: nn.Module, context: StepContext) -> None:
        super().__init__()
        self.context = context
        self.form: Any = None
        self.bias: DenseWeights | None = None
        self._hook = torch.zeros(1, requires_grad=True)  # so that torch comes back through the first layer too

    def begin(self, form: Any, bias: DenseWeights | None) -> None:
        """Start a block of clients."""
        self.form, self.bias = form, bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of all clients, `[K * B, ...]`."""
        result: Tensor = _Applied.apply(inputs, self._hook, self)  # type: ignore[no-untyped-call]
        return result

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, Any]:
        """Outputs, and what the way back needs; it will be `inward` where slopes of the inputs are wanted."""
        raise NotImplementedError

    def back(self, slopes: Tensor, kept: Any, inward: bool) -> Any:
        """Learn; the slopes of the inputs if they are wanted."""
        raise NotImplementedError

    def rounded(self, inputs: Tensor) -> Tensor:
        """`inputs` as the layer is to meet them."""
        return inputs if self.context.precision is None else inputs.to(self.context.precision)

    def learn_bias(self, slopes: Tensor) -> None:
        """From `slopes [K, B, out]`."""
        if self.bias is not None:
            self.bias.take(slopes.sum(dim=1), self.context.rate)


class ClientLinear(ClientLayer):
    """`nn.Linear` for each client, in any form."""

    form: WeightForm

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, tuple[Tensor, torch.dtype]]:
        """Outputs, and what the way back needs, which is `inward` where slopes of the inputs are wanted."""
        rows = self.rounded(inputs.reshape(self.context.clients, -1, inputs.shape[-1]))
        outputs = self.form.outputs(rows)
        if self.bias is not None:
            outputs = outputs.add_(upto(self.context.clients, self.bias.weight).unsqueeze(1))
        return outputs.reshape(*inputs.shape[:-1], -1), (rows, inputs.dtype)

    def back(self, slopes: Tensor, kept: tuple[Tensor, torch.dtype], inward: bool) -> Tensor | None:
        """Learn; the slopes of the inputs if they are wanted."""
        rows, dtype = kept
        outer = slopes.reshape(self.context.clients, -1, slopes.shape[-1])
        result = as_type(self.form.inward(outer).reshape(*slopes.shape[:-1], -1), dtype) if inward else None
        self.form.learn(outer, rows, self.context.rate)
        self.learn_bias(outer)
        return result


class ClientDropout(nn.Module):
    """Dropout that draws for each client what it would draw by itself."""

    def __init__(self, original: nn.Dropout, context: StepContext) -> None:
        super().__init__()
        self.p, self.context = original.p, context

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs [K * B, ...]` with a share of them set to zero."""
        if not self.training or self.p == 0:
            return inputs
        keep = torch.zeros_like(inputs)
        pieces = keep.unflatten(0, (self.context.clients, -1))
        for mine, length, generator in zip(pieces, self.context.lengths, self.context.generators, strict=False):
            if length:  # some clients at the end may have finished
                drawn = torch.empty(mine[:length].shape, dtype=inputs.dtype).bernoulli_(1 - self.p, generator=generator)
                mine[:length] = drawn.div_(1 - self.p)
        return inputs * keep
