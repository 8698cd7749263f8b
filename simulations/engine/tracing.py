"""A module's code as a graph of layers, if all of them treat every example by itself."""

from __future__ import annotations

import operator
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

BY_EXAMPLE = {
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample,
}  # fmt: skip
NUMBER_BY_NUMBER = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.gt, operator.ge, operator.lt, operator.le, torch.where, torch.maximum, torch.minimum, torch.nan_to_num,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.abs, torch.exp, torch.log, torch.sqrt, torch.square,
    torch.sin, torch.cos, torch.clamp, torch.tanh, torch.sigmoid, F.tanh, F.sigmoid, F.relu6, F.leaky_relu, F.elu,
    F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.logsigmoid, F.hardtanh, F.hardswish,
    F.hardsigmoid, "add", "sub", "mul", "div", "neg", "abs", "exp", "log", "sqrt", "square", "clamp", "tanh", "sigmoid",
    "float", "contiguous",
}  # fmt: skip
POOLING = {F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
ALONG = {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.mean, torch.sum, "softmax", "log_softmax",
         "mean", "sum"}  # fmt: skip
RECTIFIERS = {torch.relu, F.relu, "relu"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Wrapped(nn.Module):
    """What is read is not at the top, where torch would look into a layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.traced = module

    def forward(self, inputs: Tensor) -> Any:
        """Its outputs."""
        return self.traced(inputs)


class Function(nn.Module):
    """A function of one tensor, and of constants."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self._target, self._given = node.target, (node.args, node.kwargs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Its outputs."""
        target = self._target
        function: Any = getattr(torch.Tensor, target) if isinstance(target, str) else target
        arguments, options = fx.map_arg(self._given, lambda _: inputs)
        result: Tensor = function(*arguments, **options)
        return result


class Reshape(nn.Module):
    """Every example in another `shape`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Its outputs."""
        return inputs.reshape(len(inputs), *self._shape)


def trace(module: nn.Module) -> fx.GraphModule:
    """`module` in training as layers called "traced.NAME", functions as layers too where they have one input.

    Linear, convolutional and dropout layers stay. Raises `ValueError`, naming what it met, for all that is not known to
    treat every example by itself, and for code that decides by its inputs.
    """
    for name, inner in module.named_modules():
        if any(getattr(inner, kind) for kind in HOOKS) or "forward" in vars(inner):
            raise ValueError(f"{_called(name)} has hooks")
    wrapped, tracer, before = Wrapped(module).train(), fx.Tracer(), dice()
    try:
        graph = tracer.trace(wrapped)
    except Exception as error:  # its own code runs here
        raise ValueError(f"its code cannot be followed ({type(error).__name__}: {error})") from error
    if dice() != before:
        raise ValueError("its code draws random numbers")
    graph_module = fx.GraphModule(wrapped, graph)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method") and (layer := _layer(node)) is not None:
            name = f"function_{node.name}"
            graph_module.add_module(name, layer)
            with graph.inserting_after(node):
                node.replace_all_uses_with(graph.call_module(name, (node.all_input_nodes[0],)))
    graph.eliminate_dead_code()
    for node in graph.nodes:
        _check(node, graph_module)
    graph_module.recompile()
    return graph_module


def dice() -> tuple[Any, ...]:
    """Where the random numbers of Python, NumPy and torch stand."""
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["key"].tolist(), numpy["state"]["pos"], torch.get_rng_state().tolist()


def name_of(node: fx.Node) -> str:
    """The name that a layer has in the module that was read."""
    return str(node.target).removeprefix("traced").removeprefix(".")


def _layer(node: fx.Node) -> nn.Module | None:
    """A call that takes one tensor as a layer, if it treats every example by itself."""
    what: Any = node.target
    rest: Any = node.args[1:]
    options: Any = node.kwargs
    if what in NUMBER_BY_NUMBER and len(node.all_input_nodes) == 1:
        return Function(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if what in ("view", "reshape"):
        return _reshape(rest[0] if len(rest) == 1 and isinstance(rest[0], tuple) else rest)
    if len(node.all_input_nodes) > 1:
        return None
    if what in RECTIFIERS:
        return nn.ReLU(*rest, **options)
    if what is F.max_pool2d and len(rest) <= 4:  # from there on the layer has another order
        return nn.MaxPool2d(*rest, **options)
    if what is F.dropout:
        return _dropout(*rest, **options)
    if what in (torch.flatten, "flatten"):
        return _flatten(*rest, **options)
    if what is operator.getitem:
        index = rest[0] if isinstance(rest[0], tuple) else rest
        return Function(node) if index[0] in (Ellipsis, slice(None)) else None
    along = what in ALONG and _spares_examples(options.get("dim", rest[0] if rest else None))
    return Function(node) if along or what in POOLING else None


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    return nn.Dropout(p, inplace) if training else nn.Identity()


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


def _reshape(shape: Any) -> nn.Module | None:
    are_counted = len(shape) >= 2 and (shape[0] == -1 or _is_count(shape[0]))
    if not are_counted or any(type(size) is not int for size in shape[1:]):
        return None
    return nn.Flatten() if len(shape) == 2 else Reshape(tuple(shape[1:]))


def _is_count(value: Any) -> bool:
    """Whether it is how many examples there are, as in `x.size(0)`, `x.size()[0]` and `x.shape[0]`."""
    if not isinstance(value, fx.Node):
        return False
    if value.target is operator.getitem and value.args[1] == 0:
        of: Any = value.args[0]
        return bool((of.target is getattr and of.args[1] == "shape") or (of.target == "size" and len(of.args) == 1))
    return value.target == "size" and value.args[1:] == (0,)


def _spares_examples(dimensions: Any) -> bool:
    """Whether the first dimension is none of them."""
    every = dimensions if isinstance(dimensions, (tuple, list)) else (dimensions,)
    return all(type(each) is int and (each >= 1 or each == -1) for each in every)


def _check(node: Any, graph_module: fx.GraphModule) -> None:
    """Raises `ValueError` for what may mix the examples of a batch."""
    if node.op == "call_module":
        layer: Any = graph_module.get_submodule(str(node.target))
        kind = type(layer)
        known = kind in BY_EXAMPLE or kind in (nn.Linear, nn.Dropout, Function, Reshape)
        known |= kind is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        known |= kind in (nn.Softmax, nn.LogSoftmax) and _spares_examples(layer.dim)
        known |= kind is nn.Flatten and layer.start_dim >= 1
        known |= kind is nn.InstanceNorm2d and not [*layer.parameters(), *layer.buffers()]
        if kind is nn.Dropout and layer.inplace:  # ours gives another tensor
            known = len(node.all_input_nodes[0].users) == 1
        if not known or len(node.all_input_nodes) != 1 or getattr(layer, "return_indices", False):
            raise ValueError(f"{_called(name_of(node))} is a {kind.__name__}")
    elif node.op in ("call_function", "call_method"):
        joins = node.target in NUMBER_BY_NUMBER or (
            node.target is torch.cat and _spares_examples(node.kwargs.get("dim", (*node.args, None)[1]))
        )
        if not joins:
            raise ValueError(f"its code calls {getattr(node.target, '__name__', node.target)}")
    elif node.op == "get_attr":
        raise ValueError(f"its code uses {name_of(node)!r} without a layer")


def _called(name: str) -> str:
    return f"the layer {name!r}" if name else "the layer at the top"
