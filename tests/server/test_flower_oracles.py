"""Server optimisers and robust rules give the same models as Flower's own, over several rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flwr.serverapp.strategy as flower
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp.strategy import Strategy

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind
from corymb.server import FlowerStrategy
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import Bulyan, FedAvg, Krum, Rule, ServerOptimizer
from corymb.tests.support import content

NODES = 9
OPTIONS: dict[str, Any] = {"fraction_evaluate": 0.0}


def drifting(message: Message, context: Context) -> Message:
    """A client that adds its own random numbers to the model. Every client has ten examples."""
    site = int(context.node_config["partition-id"])
    number = int(str(of_kind(message.content, ConfigRecord)[0]["server-round"]))
    generator = torch.Generator().manual_seed(100 * number + site)
    state = to_state(of_kind(message.content, ArrayRecord)[0])
    moved = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
    return Message(content(moved, 10), reply_to=message)


def learned(strategy: Strategy, rounds: int) -> torch.Tensor:
    """Return the model after a number of rounds of Flower's own `start()`."""
    initial = ArrayRecord({"w": torch.linspace(-1, 1, 12).reshape(3, 4), "b": torch.zeros(3)})
    if isinstance(strategy, FlowerStrategy):
        initial = to_arrays(dict(initial.to_torch_state_dict()))
    arrays = Strategy.start(strategy, LocalGrid(drifting, NODES), initial, num_rounds=rounds).arrays
    return torch.cat([tensor.reshape(-1).float() for tensor in dict(arrays.to_torch_state_dict()).values()])


@pytest.mark.parametrize(
    ("step", "built_in"),
    [
        (
            ServerOptimizer("SGD", 0.7, {"momentum": 0.9}),
            lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9, **OPTIONS),
        ),
        (
            ServerOptimizer("Yogi", 0.05, {"betas": (0.9, 0.99), "eps": 1e-3}),
            lambda: flower.FedYogi(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-3, **OPTIONS),
        ),
        (ServerOptimizer("Adagrad", 0.1, {"eps": 1e-3}), lambda: flower.FedAdagrad(eta=0.1, tau=1e-3, **OPTIONS)),
    ],
    ids=["FedAvgM", "FedYogi", "FedAdagrad"],
)
def test_server_optimisers_equal_flowers(step: ServerOptimizer, built_in: Callable[[], Strategy]) -> None:
    """FedAdam is absent: Flower corrects its bias one round ahead of torch's Adam, so the two differ by design."""
    actual = learned(FlowerStrategy(FedAvg(), server_optimizer=step, **OPTIONS), 6)
    torch.testing.assert_close(actual, learned(built_in(), 6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "built_in"),
    [
        (Krum(hostile=2), lambda: flower.Krum(num_malicious_nodes=2, **OPTIONS)),
        (Krum(2, selected=4), lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4, **OPTIONS)),
        (Bulyan(1, one_pass=True), lambda: flower.Bulyan(num_malicious_nodes=1, **OPTIONS)),
    ],
    ids=["Krum", "MultiKrum", "Bulyan"],
)
def test_robust_rules_equal_flowers(rule: Rule[Any], built_in: Callable[[], Strategy]) -> None:
    torch.testing.assert_close(
        learned(FlowerStrategy(rule, **OPTIONS), 3), learned(built_in(), 3), rtol=1e-4, atol=1e-4
    )
