"""Replace the layers of a module by client layers, which hold one set of weights per client."""

from __future__ import annotations

from torch import fx, nn

from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.layers import ClientDropout, ClientLayer, ClientLinear, StepContext
from corymb.simulations.engine.tracing import name_of, trace


def to_client_layers(module: nn.Module, context: StepContext) -> tuple[fx.GraphModule, dict[str, ClientLayer]]:
    """Return `module` as a graph for training with client layers, and its layers with parameters by name, in order.

    Raises `ValueError` if that is not possible; the message says why and names the layer.
    """
    if any(not parameter.requires_grad for parameter in module.parameters()):
        raise ValueError("some parameters of the model do not require gradients")
    graph_module = trace(module)
    layers: dict[str, ClientLayer] = {}
    used: set[str] = set()  # names of parameters
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
            used |= {parameter_of(name, kind) for kind, _ in layer.named_parameters()}
    known = {name for name, _ in module.named_parameters()}
    if used - known:
        raise ValueError("two layers of the model share their parameters")
    if unused := known - used:
        raise ValueError(f"the model does not use its parameter {min(unused)!r}")
    return graph_module, layers


def parameter_of(layer: str, kind: str) -> str:
    """Return the name of a layer's parameter; `kind` is "weight" or "bias"."""
    return f"{layer}.{kind}".removeprefix(".")
