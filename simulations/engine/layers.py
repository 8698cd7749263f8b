"""Layers of which each client has its own, for modules whose batch holds the batches of K clients one after another.

Whatever has no parameters, like a rectifier or pooling, need not know: it treats every example by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corymb.simulations.engine.forms import Form, Stacked, upto


@dataclass
class Now:
    """What the layers of a module have to know of the step that they are in."""

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
        result: Tensor = outputs
        return result

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Any:
        return ctx.layer.back(slopes, ctx.kept, ctx.needs_input_grad[0]), None, None


class ClientLayer(nn.Module):
    """A layer with parameters; `begin` gives each block of clients new ones."""

    def __init__(self, original: nn.Module, now: Now) -> None:
        super().__init__()
        self.now = now
        self.form: Any = None
        self.bias: Stacked | None = None
        self.calls = 0
        self._hook = torch.zeros(1, requires_grad=True)  # so that torch comes back through the first layer too

    def begin(self, form: Any, bias: Stacked | None) -> None:
        """Start a block of clients."""
        self.form, self.bias = form, bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of all clients, `[K * B, ...]`."""
        self.calls += 1
        result: Tensor = _Applied.apply(inputs, self._hook, self)  # type: ignore[no-untyped-call]
        return result

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, Any]:
        """Outputs, and what the way back needs; it will be `inward` where slopes of the inputs are wanted."""
        raise NotImplementedError

    def back(self, slopes: Tensor, kept: Any, inward: bool) -> Any:
        """Learn; the slopes of the inputs if they are wanted."""
        raise NotImplementedError

    def learn_bias(self, slopes: Tensor) -> None:
        """From `slopes [K, B, out]`."""
        if self.bias is not None:
            self.bias.take(slopes.sum(dim=1), self.now.rate)


class ClientLinear(ClientLayer):
    """`nn.Linear` for each client, in any form."""

    form: Form

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, Tensor]:
        """Outputs, and what the way back needs, which is `inward` where slopes of the inputs are wanted."""
        rows = inputs.reshape(self.now.clients, -1, inputs.shape[-1])
        outputs = self.form.outputs(rows)
        if self.bias is not None:
            outputs = outputs.add_(upto(self.now.clients, self.bias.weight).unsqueeze(1))
        return outputs.reshape(*inputs.shape[:-1], -1), rows

    def back(self, slopes: Tensor, rows: Tensor, inward: bool) -> Tensor | None:
        """Learn; the slopes of the inputs if they are wanted."""
        outer = slopes.reshape(self.now.clients, -1, slopes.shape[-1])
        result = self.form.inward(outer).reshape(*slopes.shape[:-1], -1) if inward else None
        self.form.learn(outer, rows, self.now.rate)
        self.learn_bias(outer)
        return result


class ClientConv2d(ClientLayer):
    """`nn.Conv2d` for each client: its patches as rows of one batched product where the inputs have few channels
    and no slopes of them are wanted, else the library's convolution client by client.
    """

    FEW = 4
    form: Stacked

    def __init__(self, original: nn.Conv2d, now: Now) -> None:
        super().__init__(original, now)
        self.shape = tuple(original.weight.shape)
        self.stride, self.dilation = original.stride, original.dilation
        self.padding: tuple[int, ...] = tuple(map(int, original.padding))
        self.groups = original.groups
        self.as_patches = original.in_channels <= self.FEW and self.groups == 1 and self.dilation == (1, 1)

    def weights(self) -> Tensor:
        """Of the clients that still train, `[A, out, in, height, width]`."""
        weights: Tensor = upto(self.now.clients, self.form.weight).unflatten(2, self.shape[1:])
        return weights

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, Any]:
        """See `ClientLayer.outputs`."""
        clients = self.now.clients
        if self.as_patches and not inward:
            padded = nn.functional.pad(inputs, [p for p in reversed(self.padding) for _ in range(2)])
            windows = padded.unfold(2, self.shape[2], self.stride[0]).unfold(3, self.shape[3], self.stride[1])
            height, width = windows.shape[2:4]
            patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(clients, -1, self.form.weight.shape[2])
            found = self.form.outputs(patches)
            if self.bias is not None:
                found = found.add_(upto(self.now.clients, self.bias.weight).unsqueeze(1))
            return found.reshape(len(inputs), height, width, -1).permute(0, 3, 1, 2), patches
        pieces = inputs.contiguous().unflatten(0, (clients, -1))
        biases = [None] * clients if self.bias is None else upto(clients, self.bias.weight)
        found = _channels_last(
            nn.functional.conv2d(mine, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            for mine, weight, bias in zip(pieces, self.weights(), biases, strict=True)
        )
        return found, pieces

    def back(self, slopes: Tensor, kept: Tensor, inward: bool) -> Tensor | None:
        """Learn; the slopes of the inputs if they are wanted."""
        clients = self.now.clients
        if kept.dim() == 3:
            outer = slopes.permute(0, 2, 3, 1).reshape(clients, -1, slopes.shape[1])
            self.form.learn(outer, kept, self.now.rate)
            self.learn_bias(outer)
            return None
        outer = slopes.contiguous().unflatten(0, (clients, -1))
        found = []
        gradient = torch.empty_like(self.weights())
        for k, weight in enumerate(self.weights()):
            inner, mine, _ = torch.ops.aten.convolution_backward(
                outer[k], kept[k], weight, None, self.stride,
                self.padding, self.dilation, False, [0, 0], self.groups, [inward, True, False],
            )  # fmt: skip
            gradient[k] = mine
            found.append(inner)
        self.form.take(gradient.flatten(2), self.now.rate)
        self.learn_bias(outer.flatten(3).sum(dim=3))
        return _channels_last(found) if inward else None


def _channels_last(images: Iterable[Tensor]) -> Tensor:
    """One after another, as pooling has them fastest; the library's convolutions are faster the other way."""
    return torch.cat(list(images)).contiguous(memory_format=torch.channels_last)


class ClientDropout(nn.Module):
    """Dropout that draws for each client what it would draw by itself."""

    def __init__(self, original: nn.Dropout, now: Now) -> None:
        super().__init__()
        self.p, self.now = original.p, now

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs [K * B, ...]` with a share of them set to zero."""
        if not self.training or self.p == 0:
            return inputs
        keep = torch.zeros_like(inputs)
        pieces = keep.unflatten(0, (self.now.clients, -1))
        for mine, length, generator in zip(pieces, self.now.lengths, self.now.generators, strict=False):
            if length:  # some clients at the end may have finished
                drawn = torch.empty(mine[:length].shape, dtype=inputs.dtype).bernoulli_(1 - self.p, generator=generator)
                mine[:length] = drawn.div_(1 - self.p)
        return inputs * keep
