"""A module whose layers are turned into those of which each client of a block has its own."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.layers import ClientDropout, ClientLayer, ClientLinear, Now


def with_client_layers(module: nn.Module, now: Now) -> tuple[nn.Module, dict[str, ClientLayer]]:
    """A copy of `module`, to train, with client layers in the places of its own; and those by their names.

    Raises `ValueError`, naming the layer, where that cannot be done.
    """
    if any(not parameter.requires_grad for parameter in module.parameters()):
        raise ValueError("some of its parameters do not learn")
    layers: dict[str, ClientLayer] = {}
    turned = _turned(deepcopy(module), "", now, layers).train()
    if {parameter_of(name, "weight") for name in layers} - {name for name, _ in module.named_parameters()}:
        raise ValueError("two of its layers share their parameters")
    return turned, layers


def parameter_of(layer: str, kind: str) -> str:
    """The name of a layer's parameter."""
    return f"{layer}.{kind}".removeprefix(".")


def _turned(module: nn.Module, name: str, now: Now, layers: dict[str, ClientLayer]) -> nn.Module:
    if type(module) is nn.Linear:  # a class of its own may do something else
        layers[name] = ClientLinear(module, now)
        return layers[name]
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        layers[name] = ClientConv2d(module, now)
        return layers[name]
    if type(module) is nn.Dropout:
        return ClientDropout(module, now)
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if own or isinstance(module, nn.modules.dropout._DropoutNd):
        raise ValueError(f"the layer {name or 'at the top'!r} is a {type(module).__name__}")
    for child, inner in module.named_children():
        setattr(module, child, _turned(inner, f"{name}.{child}".removeprefix("."), now, layers))
    return module
