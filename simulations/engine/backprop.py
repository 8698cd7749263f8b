"""The forward and the backward pass of a module: by hand through a sequence of layers, else with torch's autograd.

For small layers autograd takes longer to record an operation than the operation itself takes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from corymb.simulations.engine.layers import ClientLayer

BY_HAND = (nn.Flatten, nn.ReLU, nn.MaxPool2d)  # and client layers


class Backprop(Protocol):
    """The two passes of a step: one `forward`, then one `backward`, both called with torch's autograd disabled.

    `needs_autograd` is True if a pass enables autograd for some of its work.
    """

    needs_autograd: bool

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""

    def backward(self, gradients: Tensor) -> None:
        """Update the layers' weights from the gradients of the outputs."""


def make_backprop(module: fx.GraphModule) -> Backprop:
    """Return `SequentialBackprop` if the layers of `module` form a sequence, else `AutogradBackprop`."""
    inner = list(module.graph.nodes)[1:-1]  # without the input and the output node
    layers = [module.get_submodule(str(node.target)) for node in inner if node.op == "call_module"]
    if len(layers) < len(inner) or any(len(node.users) > 1 for node in module.graph.nodes):
        return AutogradBackprop(module)
    return SequentialBackprop(layers)


def reader_of_examples(module: fx.GraphModule) -> nn.Module | None:
    """Return the layer that the module's inputs go into, flattened at most, if they go nowhere else, else None."""
    node = next(iter(module.graph.nodes))
    while len(node.users) == 1:
        node = next(iter(node.users))
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Flatten, nn.Identity)):
            return layer
    return None


class AutogradBackprop:
    """Both passes with torch's autograd, for any graph of layers."""

    needs_autograd = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, inputs: Tensor) -> Tensor:
        """See `Backprop`."""
        with torch.enable_grad():
            outputs: Tensor = self._module(inputs)
        self._outputs = outputs
        return outputs.detach()

    def backward(self, gradients: Tensor) -> None:
        """See `Backprop`."""
        self._outputs.backward(gradients)


class SequentialBackprop:
    """Both passes by hand through a sequence of layers; the backward pass ends at the first client layer."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._first = next(index for index, layer in enumerate(layers) if isinstance(layer, ClientLayer))
        self._saved: list[Any] = []
        self.needs_autograd = any(
            not (layer.by_hand if isinstance(layer, ClientLayer) else type(layer) in BY_HAND)
            for layer in layers[self._first :]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """See `Backprop`."""
        self._saved = []
        for index, layer in enumerate(self._layers):
            saved = None
            if isinstance(layer, ClientLayer):
                inputs, saved = layer.outputs(inputs, needs_input_gradients=index > self._first)
            elif type(layer) is nn.Flatten:
                saved, inputs = inputs, inputs.flatten(layer.start_dim, layer.end_dim)
            elif type(layer) is nn.ReLU:
                in_place = index and _owns_its_outputs(self._layers[index - 1])
                saved = inputs = inputs.clamp_min_(0) if in_place else inputs.clamp_min(0)
            elif index < self._first:
                inputs = layer(inputs)
            elif type(layer) is nn.MaxPool2d:
                before, (inputs, maxima) = inputs, torch.ops.aten.max_pool2d_with_indices(inputs, *_pooling_args(layer))
                saved = before, maxima
            else:
                with torch.enable_grad():
                    before = inputs.detach().requires_grad_()
                    after = layer(before.clone() if getattr(layer, "inplace", True) else before)
                saved, inputs = (before, after), after.detach()
            self._saved.append(saved)
        return inputs

    def backward(self, gradients: Tensor) -> None:
        """See `Backprop`."""
        next_layer = self._layers[-1]
        for index in range(len(self._layers) - 1, self._first - 1, -1):
            layer, saved = self._layers[index], self._saved.pop()
            if isinstance(layer, ClientLayer):
                gradients = layer.backward(gradients, saved, index > self._first)
            elif type(layer) is nn.Flatten:
                gradients = torch.empty_like(saved).copy_(
                    gradients.reshape(saved.shape)
                )  # in the inputs' memory layout
            elif type(layer) is nn.ReLU:
                into = gradients if _owns_its_outputs(next_layer) else torch.empty_like(gradients)
                gradients = torch.ops.aten.threshold_backward.grad_input(gradients, saved, 0, grad_input=into)
            elif type(layer) is nn.MaxPool2d:
                before, maxima = saved
                gradients = torch.ops.aten.max_pool2d_with_indices_backward(
                    gradients, before, *_pooling_args(layer), maxima
                )
            else:
                (gradients,) = torch.autograd.grad(saved[1], saved[0], gradients)
            next_layer = layer


def _owns_its_outputs(layer: nn.Module) -> bool:
    """Return whether the tensors that a layer returns are used nowhere else, so they may be changed in place."""
    return isinstance(layer, ClientLayer) or type(layer) is nn.MaxPool2d


def _pooling_args(pooling: nn.MaxPool2d) -> tuple[Any, ...]:
    """Return size, stride, padding, dilation and rounding mode as torch's pooling operation takes them."""
    pairs = (pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation)
    return *([pair, pair] if isinstance(pair, int) else list(pair) for pair in pairs), pooling.ceil_mode
