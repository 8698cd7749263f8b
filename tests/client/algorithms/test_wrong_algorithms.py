"""A client algorithm that does not do what `ClientAlgorithm` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import Context
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, make_client_app
from corymb.client.algorithms.algorithm import ClientAlgorithm, Local
from corymb.protocol.codec import to_arrays
from corymb.server import FlowerStrategy
from corymb.server.rounds.run_failed import NoReplyAdmitted
from corymb.simulations import LocalGrid
from corymb.strategies import FedAvg


@dataclass(frozen=True)
class WithoutSteps(ClientAlgorithm):
    def train(self, local: Local) -> dict[str, float]:
        return {"loss": local.fit(local.module)["loss"]}


@dataclass(frozen=True)
class WithoutMetrics(ClientAlgorithm):
    def train(self, local: Local) -> dict[str, float]:
        local.fit(local.module)
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class WithTensor(ClientAlgorithm):
    def train(self, local: Local) -> dict[str, float]:
        return {**local.fit(local.module), "drift": torch.ones(())}  # type: ignore[dict-item]


@dataclass(frozen=True)
class KeepsNumber(ClientAlgorithm):
    def train(self, local: Local) -> dict[str, float]:
        metrics = local.fit(local.module)
        local.kept["best"] = metrics["loss"]  # type: ignore[assignment]
        return metrics


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            WithoutSteps,
            "of '.*:WithoutSteps' returned no 'steps', the number of steps; return",
        ),
        (WithoutMetrics, "of '.*:WithoutMetrics' returned None; return the metrics of local.fit"),
        (WithTensor, "returned a Tensor as the metric 'drift'; return the metrics of local.fit, numbers"),
        (KeepsNumber, "A client keeps tensors only, and 'best' is a float; use torch.tensor"),
    ],
)
def test_the_error_says_what_is_missing(algorithm: type[ClientAlgorithm], message: str, tmp_path: Path) -> None:
    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        own = TensorDataset(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))
        return own, own

    settings = TrainSettings(algorithm=f"{__name__}:{algorithm.__name__}")
    config = {**settings.flat(), "client-memory": str(tmp_path)}
    grid = LocalGrid(make_client_app(lambda: nn.Linear(2, 2), data), 2, run_config=config)
    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0, min_available_nodes=1)
    with pytest.raises(NoReplyAdmitted, match=message):
        strategy.start(grid, to_arrays(nn.Linear(2, 2).state_dict()), 1)
