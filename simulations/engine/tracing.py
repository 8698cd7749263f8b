"""Trace a module into a graph of layers, and check that no operation mixes the examples of a batch."""

from __future__ import annotations

import operator
import random
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from corymb.simulations.engine.examplewise import (
    ALONG_A_DIMENSION,
    ELEMENTWISE_FUNCTIONS,
    EXAMPLEWISE_LAYERS,
    POOLING,
    RELU_FUNCTIONS,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Wrapped(nn.Module):
    """Wraps the module to trace, because fx traces into the code of the top module even if it is a single layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.traced = module

    def forward(self, inputs: Tensor) -> Any:
        """Return the module's outputs."""
        return self.traced(inputs)


class Function(nn.Module):
    """A layer that calls the function of a graph node, which has one tensor and constants as arguments."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self._target, self._arguments = node.target, (node.args, node.kwargs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the function's value for `inputs`."""
        target = self._target
        function: Any = getattr(torch.Tensor, target) if isinstance(target, str) else target
        arguments, options = fx.map_arg(self._arguments, lambda _: inputs)
        result: Tensor = function(*arguments, **options)
        return result


class Reshape(nn.Module):
    """A layer that gives every example another `shape`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the examples of `inputs` in the shape."""
        return inputs.reshape(len(inputs), *self._shape)


class _Tracer(fx.Tracer):
    """Traces up to the layers of torch and those of the classes `known`."""

    def __init__(self, known: Collection[type[nn.Module]]) -> None:
        super().__init__()
        self._known = known

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a layer becomes one node of the graph."""
        return type(m) in self._known or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, known: Collection[type[nn.Module]]) -> fx.GraphModule:
    """Return `module`, in training mode, as a graph of layers "traced.NAME".

    Functions of one tensor become layers too. Layers of the classes `known` are left as they are. Raises `ValueError`,
    which names the layer or function, for every other operation that is not known to process each example
    independently, and for code that branches on its inputs.
    """
    for name, inner in module.named_modules():
        if any(getattr(inner, kind) for kind in HOOKS) or "forward" in vars(inner):
            raise ValueError(f"{label(name)} has hooks")
    wrapped, tracer, states = Wrapped(module).train(), _Tracer(known), random_states()
    try:
        graph = tracer.trace(wrapped)
    except Exception as error:  # the model's own code runs here
        raise ValueError(f"the model's code cannot be traced ({type(error).__name__}: {error})") from error
    if random_states() != states:
        raise ValueError("the model's code draws random numbers")
    graph_module = fx.GraphModule(wrapped, graph)
    graph = graph_module.graph
    parts = check_recurrent(graph_module)
    for node in list(graph.nodes):
        if node in parts:
            continue
        if node.op in ("call_function", "call_method") and (layer := _layer(node)) is not None:
            name = f"function_{node.name}"
            graph_module.add_module(name, layer)
            with graph.inserting_after(node):
                node.replace_all_uses_with(graph.call_module(name, (node.all_input_nodes[0],)))
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node not in parts:
            _check(node, graph_module, known)
    graph_module.recompile()
    return graph_module


def random_states() -> tuple[Any, ...]:
    """Return the states of the random generators of Python, NumPy and torch."""
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["key"].tolist(), numpy["state"]["pos"], torch.get_rng_state().tolist()


def name_of(node: fx.Node) -> str:
    """Return the name that a node's layer has in the original module."""
    return str(node.target).removeprefix("traced").removeprefix(".")


def _layer(node: fx.Node) -> nn.Module | None:
    """Return the call of a node as a layer if it takes one tensor and processes examples independently, else None."""
    target: Any = node.target
    arguments: Any = node.args[1:]
    options: Any = node.kwargs
    if target in ELEMENTWISE_FUNCTIONS and len(node.all_input_nodes) == 1:
        return Function(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if target in ("view", "reshape"):
        return _reshape(arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else arguments)
    if len(node.all_input_nodes) > 1:
        return None
    if target in RELU_FUNCTIONS:
        return nn.ReLU(*arguments, **options)
    if target is F.max_pool2d and len(arguments) <= 4:  # the layer orders its further arguments differently
        return nn.MaxPool2d(*arguments, **options)
    if target is F.dropout:
        return _dropout(*arguments, **options)
    if target in (torch.flatten, "flatten"):
        return _flatten(*arguments, **options)
    if target is operator.getitem:
        index = arguments[0] if isinstance(arguments[0], tuple) else arguments
        return Function(node) if index[0] in (Ellipsis, slice(None)) else None
    is_examplewise = target in ALONG_A_DIMENSION and _excludes_batch(
        options.get("dim", arguments[0] if arguments else None)
    )
    return Function(node) if is_examplewise or target in POOLING else None


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    return nn.Dropout(p, inplace) if training else nn.Identity()


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


def _reshape(shape: Any) -> nn.Module | None:
    """Return a layer that reshapes each example, or None if `shape` may change the dimension of the batch."""
    keeps_batch = len(shape) >= 2 and (shape[0] == -1 or _is_batch_size(shape[0]))
    if not keeps_batch or any(type(size) is not int for size in shape[1:]):
        return None
    return nn.Flatten() if len(shape) == 2 else Reshape(tuple(shape[1:]))


def _is_batch_size(value: Any) -> bool:
    """Return whether `value` is the number of examples: `x.size(0)`, `x.size()[0]` or `x.shape[0]`."""
    if not isinstance(value, fx.Node):
        return False
    if value.target is operator.getitem and value.args[1] == 0:
        shape: Any = value.args[0]
        return bool(
            (shape.target is getattr and shape.args[1] == "shape") or (shape.target == "size" and len(shape.args) == 1)
        )
    return value.target == "size" and value.args[1:] == (0,)


def _excludes_batch(dimensions: Any) -> bool:
    """Return whether `dimensions`, one or several, do not include the first, which is that of the batch."""
    as_sequence = dimensions if isinstance(dimensions, (tuple, list)) else (dimensions,)
    return all(type(dimension) is int and (dimension >= 1 or dimension == -1) for dimension in as_sequence)


def _check(node: Any, graph_module: fx.GraphModule, classes: Collection[type[nn.Module]]) -> None:
    """Raise `ValueError` if the operation of a node may mix the examples of a batch."""
    if node.op == "call_module":
        layer: Any = graph_module.get_submodule(str(node.target))
        kind = type(layer)
        known = kind in EXAMPLEWISE_LAYERS or kind in classes or kind in (Function, Reshape)
        known |= kind in (nn.Softmax, nn.LogSoftmax) and _excludes_batch(layer.dim)
        known |= kind is nn.Flatten and layer.start_dim >= 1
        known |= kind is nn.InstanceNorm2d and not [*layer.parameters(), *layer.buffers()]
        # `ClientDropout` does not change its input, which another layer may read.
        if kind is nn.Dropout and layer.inplace:
            known = len(node.all_input_nodes[0].users) == 1
        if not known or len(node.all_input_nodes) != 1 or getattr(layer, "return_indices", False):
            raise ValueError(f"{label(name_of(node))} is a {kind.__name__}")
    elif node.op in ("call_function", "call_method"):
        is_examplewise = node.target in ELEMENTWISE_FUNCTIONS or (
            node.target is torch.cat and _excludes_batch(node.kwargs.get("dim", (*node.args, None)[1]))
        )
        if not is_examplewise:
            raise ValueError(f"the model's code calls {getattr(node.target, '__name__', node.target)}")
    elif node.op == "get_attr":
        raise ValueError(f"the model's code uses {name_of(node)!r} outside a layer")


def check_recurrent(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that take apart what recurrent layers return: the outputs, and the last state of a layer.

    Raises `ValueError` if the model's code uses a state `[layers, B, ...]` otherwise, because its first dimension is
    not that of the batch.
    """
    parts: set[fx.Node] = set()
    for node in graph_module.graph.find_nodes(op="call_module"):
        layer = graph_module.get_submodule(str(node.target))
        if not isinstance(layer, nn.RNNBase):
            continue
        pieces = {user: user.args[1] for user in _indexed_by_number(node)}
        states = [piece for piece, index in pieces.items() if index in (1, -1)]
        if isinstance(layer, nn.LSTM):
            both = {inner for state in states for inner in _indexed_by_number(state)}
            parts |= both
            states = list(both)
        parts |= pieces.keys()
        for state in states:
            parts |= set(_indexed_by_number(state))
    return parts


def _indexed_by_number(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node, which all have to be `node[i]`."""
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise ValueError(f"the model's code uses the state of {label(name_of(node))} other than by its number")
    return list(node.users)


def label(name: str) -> str:
    """Return the name of a layer for an error message."""
    return f"the layer {name!r}" if name else "the model"
