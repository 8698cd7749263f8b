"""A module's code is followed where every example is treated by itself, and refused by name where that is not known."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corymb.simulations.engine.backprop import ByAutograd, ByHand, enters_directly, make_backprop
from corymb.simulations.engine.client_layers import to_client_layers
from corymb.simulations.engine.layers import StepContext
from corymb.simulations.engine.tracing import trace


class Net(nn.Module):
    """As in tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3, padding=1)
        self.middle, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        found = F.relu(self.first(inputs))
        found = F.max_pool2d(F.relu(self.second(found)), 2)
        found = F.dropout(found.view(found.size(0), -1), 0.2, training=self.training)
        return F.log_softmax(self.last(torch.tanh(self.middle(found))), dim=1)


class Does(nn.Module):
    """One linear layer, and something before it."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.before, self.last = before, nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.before(inputs))
        return outputs


def test_a_tutorial_s_network_is_a_sequence_of_layers() -> None:
    torch.manual_seed(0)
    net = Net()
    graph = trace(net)
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
    turned, client_layers = to_client_layers(net, StepContext())
    assert list(client_layers) == ["first", "second", "middle", "last"]
    assert isinstance(make_backprop(turned), ByHand)


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
def test_the_examples_enter_directly_however_they_are_flattened(before: Any) -> None:
    turned, _ = to_client_layers(Does(before), StepContext())
    assert enters_directly(turned)
    assert isinstance(make_backprop(turned), ByHand)


@pytest.mark.parametrize(
    ("before", "chain"),
    [
        (lambda x: (x.flatten(1) - 0.13) / 0.31, ByHand),
        (lambda x: 1 - x.flatten(1), ByHand),
        (lambda x: x.view(x.size(0), 4, 9).flatten(1), ByHand),
        (lambda x: x[:, 0].flatten(1), ByHand),
        (lambda x: x.flatten(1) + F.softmax(x.flatten(1), dim=1), ByAutograd),
        (lambda x: torch.cat([x.flatten(1)[:, :6], x.mean((1, 2, 3), True).flatten(1) * x.flatten(1)[:, 6:]], 1),
         ByAutograd),
    ],
)  # fmt: skip
def test_other_ways_in_are_followed(before: Any, chain: type) -> None:
    module = Does(before)
    inputs = torch.randn(3, 1, 6, 6)
    assert torch.equal(trace(module)(inputs), module(inputs))
    turned, _ = to_client_layers(module, StepContext())
    assert not enters_directly(turned)
    assert isinstance(make_backprop(turned), chain)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (lambda x: x.flatten(1) - x.flatten(1).mean(0), "its code calls mean"),
        (lambda x: x.flatten(1) - x.mean(), "its code calls mean"),
        (lambda x: F.softmax(x.flatten(1), dim=0), "its code calls softmax"),
        (lambda x: torch.cat([x.flatten(1), x.flatten(1)]), "its code calls cat"),
        (lambda x: x.flatten(), "the layer 'function_flatten' is a Flatten"),
        (lambda x: x.flatten(1) + torch.ones(36), "its code uses '_tensor_constant0' without a layer"),
        (lambda x: x.flatten(1)[1:], "its code calls getitem"),
        (lambda x: x.flatten(1) * x.size(0), "its code calls size"),
        (lambda x: x.flatten(1).cumsum(0), "its code calls cumsum"),
        (lambda x: x.flatten(1) if x.sum() > 0 else x.flatten(1) * 2, "its code cannot be followed .TraceError"),
        (lambda x: x.flatten(1) * (0 if torch.rand(()) < 0.01 else 1), "its code draws random numbers"),
        (lambda x: x.flatten(1) * random.choice([1, 1]), "its code draws random numbers"),
        (lambda x: x.flatten(1) * int(np.random.choice([1, 1])), "its code draws random numbers"),
        (lambda x: F.dropout2d(x).flatten(1), "its code .*dropout2d"),
        (nn.Softmax(dim=0), "the layer 'before' is a Softmax"),
        (nn.Flatten(0), "the layer 'before' is a Flatten"),
        (nn.BatchNorm2d(1), "the layer 'before' is a BatchNorm2d"),
        (nn.MaxPool2d(2, return_indices=True), "the layer 'before' is a MaxPool2d"),
    ],
)
def test_what_may_mix_examples_is_refused_by_name(before: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(Does(before))


def test_hooks_are_not_passed_over() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    module[1].register_forward_hook(lambda layer, inputs, outputs: outputs.tanh())
    with pytest.raises(ValueError, match="the layer '1' has hooks"):
        trace(module)


def test_layers_are_used_once_and_all_of_them() -> None:
    inner = nn.Linear(36, 36)
    with pytest.raises(ValueError, match="the layer 'before' is used twice"):
        to_client_layers(Twice(inner), StepContext())
    module = Does(nn.Flatten())
    module.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="it does not use 'spare"):
        to_client_layers(module, StepContext())


class Twice(Does):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.before(inputs.flatten(1))))
