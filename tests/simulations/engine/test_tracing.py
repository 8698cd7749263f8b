"""Modules that process examples independently are traced; others raise an error that names the operation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corymb.simulations.engine.backprop import (
    AutogradBackprop,
    SequentialBackprop,
    make_backprop,
    reader_of_examples,
)
from corymb.simulations.engine.client_layers import CLIENT_LAYERS, to_client_layers
from corymb.simulations.engine.layers import StepContext
from corymb.simulations.engine.linear import ClientLinear
from corymb.simulations.engine.tracing import trace


class Net(nn.Module):
    """A convolutional network as in tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3, padding=1)
        self.middle, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.first(inputs))
        hidden = F.max_pool2d(F.relu(self.second(hidden)), 2)
        hidden = F.dropout(hidden.view(hidden.size(0), -1), 0.2, training=self.training)
        return F.log_softmax(self.last(torch.tanh(self.middle(hidden))), dim=1)


class WithFirst(nn.Module):
    """A linear layer after the function or layer `before`."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.before, self.last = before, nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.before(inputs))
        return outputs


def test_a_tutorial_network_becomes_a_sequence_of_layers() -> None:
    torch.manual_seed(0)
    net = Net()
    graph = trace(net, CLIENT_LAYERS)
    layers = [graph.get_submodule(str(node.target)) for node in list(graph.graph.nodes)[1:-1]]
    assert [type(layer).__name__ for layer in layers] == [
        "Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Dropout", "Linear", "Function", "Linear",
        "Function",
    ]  # fmt: skip
    inputs = torch.randn(5, 1, 6, 6)
    torch.manual_seed(1)
    expected = net(inputs)
    torch.manual_seed(1)
    assert torch.equal(graph(inputs), expected)
    graph_module, client_layers = to_client_layers(net, StepContext())
    assert list(client_layers) == ["first", "second", "function_dropout", "middle", "last"]
    assert isinstance(make_backprop(graph_module), SequentialBackprop)


@pytest.mark.parametrize(
    "before",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape((x.size()[0], 36)),
        lambda x: x.view(-1, 36),
    ],
)
def test_flattened_inputs_feed_one_client_layer(before: Any) -> None:
    graph_module, _ = to_client_layers(WithFirst(before), StepContext())
    assert isinstance(reader_of_examples(graph_module), ClientLinear)
    assert isinstance(make_backprop(graph_module), SequentialBackprop)


@pytest.mark.parametrize(
    ("before", "backprop"),
    [
        (lambda x: (x.flatten(1) - 0.13) / 0.31, SequentialBackprop),
        (lambda x: 1 - x.flatten(1), SequentialBackprop),
        (lambda x: x.view(x.size(0), 4, 9).flatten(1), SequentialBackprop),
        (lambda x: x[:, 0].flatten(1), SequentialBackprop),
        (lambda x: x.flatten(1) + F.softmax(x.flatten(1), dim=1), AutogradBackprop),
        (lambda x: torch.cat([x.flatten(1)[:, :6], x.mean((1, 2, 3), True).flatten(1) * x.flatten(1)[:, 6:]], 1),
         AutogradBackprop),
    ],
)  # fmt: skip
def test_other_functions_of_the_inputs_are_traced(before: Any, backprop: type) -> None:
    module = WithFirst(before)
    inputs = torch.randn(3, 1, 6, 6)
    assert torch.equal(trace(module, CLIENT_LAYERS)(inputs), module(inputs))
    graph_module, _ = to_client_layers(module, StepContext())
    assert not isinstance(reader_of_examples(graph_module), ClientLinear)
    assert isinstance(make_backprop(graph_module), backprop)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (lambda x: x.flatten(1) - x.flatten(1).mean(0), "the model's code calls mean"),
        (lambda x: x.flatten(1) - x.mean(), "the model's code calls mean"),
        (lambda x: F.softmax(x.flatten(1), dim=0), "the model's code calls softmax"),
        (lambda x: torch.cat([x.flatten(1), x.flatten(1)]), "the model's code calls cat"),
        (lambda x: x.flatten(), "the layer 'function_flatten' is a Flatten"),
        (lambda x: x.flatten(1) + torch.ones(36), "the model's code uses '_tensor_constant0' outside a layer"),
        (lambda x: x.flatten(1)[1:], "the model's code calls getitem"),
        (lambda x: x.flatten(1) * x.size(0), "the model's code calls size"),
        (lambda x: x.flatten(1).cumsum(0), "the model's code calls cumsum"),
        (lambda x: x.flatten(1) if x.sum() > 0 else x.flatten(1) * 2, "the model's code cannot be traced .TraceError"),
        (lambda x: x.flatten(1) * (0 if torch.rand(()) < 0.01 else 1), "the model's code draws random numbers"),
        (lambda x: x.flatten(1) * random.choice([1, 1]), "the model's code draws random numbers"),
        (lambda x: x.flatten(1) * int(np.random.choice([1, 1])), "the model's code draws random numbers"),
        (lambda x: F.dropout2d(x).flatten(1), "the model's code .*dropout2d"),
        (nn.Softmax(dim=0), "the layer 'before' is a Softmax"),
        (nn.Flatten(0), "the layer 'before' is a Flatten"),
        (nn.LocalResponseNorm(1), "the layer 'before' is a LocalResponseNorm"),
        (nn.MaxPool2d(2, return_indices=True), "the layer 'before' is a MaxPool2d"),
    ],
)
def test_an_operation_that_may_mix_examples_is_named(before: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(WithFirst(before), CLIENT_LAYERS)


def test_hooks_are_rejected() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    module[1].register_forward_hook(lambda layer, inputs, outputs: outputs.tanh())
    with pytest.raises(ValueError, match="the layer '1' has hooks"):
        trace(module, CLIENT_LAYERS)


def test_every_layer_must_be_used_exactly_once() -> None:
    inner = nn.Linear(36, 36)
    with pytest.raises(ValueError, match="the layer 'before' is used twice"):
        to_client_layers(Twice(inner), StepContext())
    module = WithFirst(nn.Flatten())
    module.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not use its parameter 'spare"):
        to_client_layers(module, StepContext())


class Twice(WithFirst):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.before(inputs.flatten(1))))
