"""A module's way forward and back: by hand along a sequence of layers, by torch's autograd through anything else.

Small layers take less time than autograd does to note them down.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.layers import ClientLayer
from corymb.simulations.engine.scratch import Scratch

BY_HAND = (nn.Flatten, nn.ReLU, nn.MaxPool2d)  # beside client layers


class Backprop(Protocol):
    """Forward, then backward, once each per step, with torch's autograd switched off.

    `needs_autograd` is whether it switches autograd on for some of it; `is_fixed` whether it is known to do the same to
    any inputs.
    """

    needs_autograd: bool
    is_fixed: bool

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs."""

    def backward(self, slopes: Tensor) -> None:
        """Have the layers learn from the slopes of the outputs."""


def make_backprop(module: fx.GraphModule) -> Backprop:
    """By hand for layers that follow one another."""
    inner = list(module.graph.nodes)[1:-1]  # between its inputs and its outputs
    layers = [module.get_submodule(str(node.target)) for node in inner if node.op == "call_module"]
    if len(layers) < len(inner) or any(len(node.users) > 1 for node in module.graph.nodes):
        return ByAutograd(module)
    for place, pair in enumerate(pairwise(layers)):
        if tuple(map(type, pair)) == (nn.ReLU, nn.MaxPool2d):  # the same the other way round, on fewer numbers
            layers[place : place + 2] = pair[::-1]
    return ByHand(layers)


def enters_directly(module: fx.GraphModule) -> bool:
    """Whether the examples enter a client layer, flattened at most, and nothing else."""
    node = next(iter(module.graph.nodes))
    while len(node.users) == 1:
        node = next(iter(node.users))
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Flatten, nn.Identity)):
            return isinstance(layer, ClientLayer)
    return False


class ByAutograd:
    """Any graph."""

    needs_autograd = True
    is_fixed = False

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, inputs: Tensor) -> Tensor:
        """See `Backprop`."""
        with torch.enable_grad():
            outputs: Tensor = self._module(inputs)
        self._outputs = outputs
        return outputs.detach()

    def backward(self, slopes: Tensor) -> None:
        """See `Backprop`."""
        self._outputs.backward(slopes)


class ByHand:
    """Layers one after another; those before the first that learns need no way back."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._first = next(place for place, layer in enumerate(layers) if isinstance(layer, ClientLayer))
        last = next(layer for layer in reversed(layers) if isinstance(layer, ClientLayer))
        self._lends_outputs = isinstance(last, ClientConv2d)  # from memory that it uses again
        self._kept: list[Any] = []
        self._scratches = {place: Scratch() for place, layer in enumerate(layers) if type(layer) is nn.MaxPool2d}
        self.needs_autograd = any(
            not isinstance(layer, ClientLayer) and type(layer) not in BY_HAND for layer in layers[self._first :]
        )
        known = all(isinstance(layer, ClientLayer) or type(layer) in (*BY_HAND, nn.Identity) for layer in layers)
        self.is_fixed = known and not self.needs_autograd

    def forward(self, inputs: Tensor) -> Tensor:
        """See `Backprop`."""
        self._kept = []
        for place, layer in enumerate(self._layers):
            kept = None
            if isinstance(layer, ClientLayer):
                inputs, kept = layer.outputs(inputs, inward=place > self._first)
            elif type(layer) is nn.Flatten:
                kept, inputs = inputs, inputs.flatten(layer.start_dim, layer.end_dim)
            elif type(layer) is nn.ReLU:
                mine = place and _makes_its_outputs(self._layers[place - 1])
                kept = inputs = inputs.clamp_min_(0) if mine else inputs.clamp_min(0)
            elif place < self._first:
                inputs = layer(inputs)
            elif type(layer) is nn.MaxPool2d:
                before, (inputs, chosen) = inputs, torch.ops.aten.max_pool2d_with_indices(inputs, *_geometry(layer))
                kept = before, chosen
            else:
                with torch.enable_grad():
                    before = inputs.detach().requires_grad_()
                    after = layer(before.clone() if getattr(layer, "inplace", True) else before)
                kept, inputs = (before, after), after.detach()
            self._kept.append(kept)
        return inputs.clone() if self._lends_outputs else inputs

    def backward(self, slopes: Tensor) -> None:
        """See `Backprop`."""
        after = self._layers[-1]
        for place in range(len(self._layers) - 1, self._first - 1, -1):
            layer, kept = self._layers[place], self._kept.pop()
            if isinstance(layer, ClientLayer):
                slopes = layer.back(slopes, kept, place > self._first)
            elif type(layer) is nn.Flatten:
                slopes = torch.empty_like(kept).copy_(slopes.reshape(kept.shape))  # as it lies in memory
            elif type(layer) is nn.ReLU:
                into = slopes if _makes_its_outputs(after) else torch.empty_like(slopes)
                slopes = torch.ops.aten.threshold_backward.grad_input(slopes, kept, 0, grad_input=into)
            elif type(layer) is nn.MaxPool2d:
                before, chosen = kept
                pooling, told = torch.ops.aten.max_pool2d_with_indices_backward, (before, *_geometry(layer), chosen)
                if before.is_cuda:  # whose kernel takes memory of its own order only
                    slopes = pooling.default(slopes, *told)
                else:
                    strides = torch.empty_like(before, device="meta").stride()  # `before` itself may have gaps
                    room = self._scratches[place].of(before.shape, before).as_strided(before.shape, strides)
                    slopes = pooling.grad_input(slopes, *told, grad_input=room)
            else:
                (slopes,) = torch.autograd.grad(kept[1], kept[0], slopes)
            after = layer


def _makes_its_outputs(layer: nn.Module) -> bool:
    """Whether what a layer gives, forward or back, is nobody else's, so that it may be changed in place."""
    return isinstance(layer, ClientLayer) or type(layer) is nn.MaxPool2d


def _geometry(pooling: nn.MaxPool2d) -> tuple[Any, ...]:
    """Size, stride, padding and dilation, as torch's operation wants them, and whether it rounds up."""
    pairs = (pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation)
    return *([pair, pair] if isinstance(pair, int) else list(pair) for pair in pairs), pooling.ceil_mode
