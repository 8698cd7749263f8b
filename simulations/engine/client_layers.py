"""A module whose layers are graph_module into those of which each client of a block has its own."""

from __future__ import annotations

from torch import fx, nn

from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.layers import ClientDropout, ClientLayer, ClientLinear, StepContext
from corymb.simulations.engine.tracing import name_of, trace


def to_client_layers(module: nn.Module, context: StepContext) -> tuple[fx.GraphModule, dict[str, ClientLayer]]:
    """`module` as a graph, to train, with client layers in the places of its own; and those by their names, in order.

    Raises `ValueError`, naming the layer, where that cannot be done.
    """
    if any(not parameter.requires_grad for parameter in module.parameters()):
        raise ValueError("some of its parameters do not learn")
    graph_module = trace(module)
    layers: dict[str, ClientLayer] = {}
    met: set[str] = set()
    for node in graph_module.graph.find_nodes(op="call_module"):
        layer, name = graph_module.get_submodule(str(node.target)), name_of(node)
        if name in layers:
            raise ValueError(f"the layer {name!r} is used twice")
        if isinstance(layer, nn.Linear):
            layers[name] = ClientLinear(layer, context)
        elif isinstance(layer, nn.Conv2d):
            layers[name] = ClientConv2d(layer, context)
        elif isinstance(layer, nn.Dropout):
            graph_module.set_submodule(str(node.target), ClientDropout(layer, context))
        if name in layers:
            graph_module.set_submodule(str(node.target), layers[name])
            met |= {parameter_of(name, kind) for kind, _ in layer.named_parameters()}
    every = {name for name, _ in module.named_parameters()}
    if met - every:
        raise ValueError("two of its layers share their parameters")
    if unused := every - met:
        raise ValueError(f"it does not use {min(unused)!r}")
    return graph_module, layers


def parameter_of(layer: str, kind: str) -> str:
    """The name of a layer's parameter."""
    return f"{layer}.{kind}".removeprefix(".")
