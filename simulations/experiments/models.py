"""The built-in models of experiments. A user's own model is given as "module:factory"."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from corymb.strategies.core.registry import Registry


def softmax(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return softmax regression for inputs of `shape`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes))


def mlp(shape: tuple[int, ...], classes: int, hidden: int = 64, depth: int = 1, batch_norm: bool = False) -> nn.Module:
    """Return a multilayer perceptron with `depth` hidden layers of `hidden` rectified linear units each.

    With `batch_norm`, each hidden layer is normalised over the batch.
    """
    widths = [torch.Size(shape).numel(), *[hidden] * depth]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *[nn.BatchNorm1d(outputs)] * batch_norm, nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))


def cnn(shape: tuple[int, ...], classes: int, hidden: int = 128, channels: int = 32) -> nn.Module:
    """Return the network of Wang & Ji 2024: two 3x3 convolutions with pooling, then one hidden layer."""
    if len(shape) != 3:
        raise ValueError(f"it needs inputs of shape [channels, height, width], not {list(shape)}")
    features = nn.Sequential(
        nn.Conv2d(shape[0], channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    width = features(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(features, nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))


Factory = Callable[..., nn.Module]
MODELS: dict[str, Factory] = {"softmax": softmax, "mlp": mlp, "cnn": cnn}
_registry: Registry[Factory] = Registry("model", MODELS, "corymb.models")


def make_model(kind: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    """Return a new model `kind` for inputs of `shape`, without the batch dimension, and this number of `classes`.

    A factory "module:name" is called with (shape, classes, **options). Raises `ValueError` if the model is unknown or
    its factory raises.
    """
    factory = _registry.find(kind)
    try:
        module = factory(shape, classes, **options)
    except Exception as error:
        raise ValueError(f"The model {kind!r} cannot be made ({type(error).__name__}: {error}).") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"The model {kind!r} is a {type(module).__name__}; return a torch.nn.Module.")
    return module
