"""The registry of client layers, and the replacement of a model's layers by them."""

from __future__ import annotations

from torch import fx, nn

from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.dropout import ClientDropout
from corymb.simulations.engine.embedding import ClientEmbedding
from corymb.simulations.engine.layers import ClientLayer, StepContext
from corymb.simulations.engine.linear import ClientLinear
from corymb.simulations.engine.norms import ClientBatchNorm, ClientGroupNorm, ClientLayerNorm
from corymb.simulations.engine.recurrent import ClientRecurrent
from corymb.simulations.engine.tracing import label, name_of, trace

# A torch layer, of exactly this class, and the client layer that replaces it.
CLIENT_LAYERS: dict[type[nn.Module], type[ClientLayer]] = {
    nn.Linear: ClientLinear,
    nn.Conv2d: ClientConv2d,
    nn.Dropout: ClientDropout,
    nn.BatchNorm1d: ClientBatchNorm,
    nn.BatchNorm2d: ClientBatchNorm,
    nn.BatchNorm3d: ClientBatchNorm,
    nn.GroupNorm: ClientGroupNorm,
    nn.LayerNorm: ClientLayerNorm,
    nn.Embedding: ClientEmbedding,
    nn.RNN: ClientRecurrent,
    nn.GRU: ClientRecurrent,
    nn.LSTM: ClientRecurrent,
}


def to_client_layers(module: nn.Module, context: StepContext) -> tuple[fx.GraphModule, dict[str, ClientLayer]]:
    """Return `module` as a graph for training with client layers, and its client layers by name, in order.

    Raises `ValueError` if that is not possible; the message says why and names the layer.
    """
    graph_module = trace(module, CLIENT_LAYERS)
    layers: dict[str, ClientLayer] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        layer, name = graph_module.get_submodule(str(node.target)), name_of(node)
        if name in layers:
            raise ValueError(f"the layer {name!r} is used twice")
        if type(layer) in CLIENT_LAYERS and not _is_fixed(name, layer):
            try:
                layers[name] = CLIENT_LAYERS[type(layer)](layer, context)
            except ValueError as error:
                raise ValueError(f"{label(name)} {error}") from None
            graph_module.set_submodule(str(node.target), layers[name])
    used = {parameter_of(name, kind) for name, layer in layers.items() for kind in layer.names}
    known = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if used - known:
        raise ValueError("two layers of the model share their parameters")
    if unused := known - used:
        raise ValueError(f"the model does not use its parameter {min(unused)!r}")
    return graph_module, layers


def _is_fixed(name: str, layer: nn.Module) -> bool:
    """Return whether no parameter of `layer` is trained, so that all clients share it.

    Raises `ValueError` for a layer of which some are, and one that keeps buffers.
    """
    trained = {parameter.requires_grad for parameter in layer.parameters()}
    if trained == {True, False}:
        raise ValueError(f"{label(name)} has parameters that are trained and others that are not")
    if trained == {False} and list(layer.buffers()):
        raise ValueError(f"{label(name)} is not trained and has buffers")
    return trained == {False}


def parameter_of(layer: str, kind: str) -> str:
    """Return the name of a layer's parameter or buffer; `kind` is its name in the layer, such as "weight"."""
    return f"{layer}.{kind}".removeprefix(".")
