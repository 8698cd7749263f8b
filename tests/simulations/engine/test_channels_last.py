"""Clients that train one by one on a CPU have their convolutions with channels last, if their module allows that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corymb.client.tasks.task import CLASSIFICATION
from corymb.simulations import Examples, Source, run
from corymb.simulations.engine.channels_last import in_faster_layout
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import resolve


def images() -> Source:
    """Noise of 40 examples, in ten classes."""
    generator = torch.Generator().manual_seed(0)
    examples = Examples(torch.randn(40, 3, 32, 32, generator=generator), torch.arange(40) % 10)
    return Source(examples, examples)


def convolutions(shape: Any = (), classes: int = 10) -> nn.Module:
    """Large ones, for which clients train one by one."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(6272, classes),
    )  # fmt: skip


class Viewing(nn.Module):
    """As many users write it: `view` in place of `flatten` needs torch's own layout."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 5), nn.Linear(6272, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores of the classes."""
        outputs: Tensor = self.features(inputs)
        scores: Tensor = self.head(outputs.view(len(outputs), -1))
        return scores


class ReadingMemory(Viewing):
    """A module whose outputs depend on the layout."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores of the classes."""
        outputs: Tensor = self.features(inputs)
        scores: Tensor = self.head(outputs.as_strided((len(outputs), 6272), (6272, 1)))
        return scores


def dropping_pixels() -> nn.Module:
    """Dropout draws its zeros in the order of memory, so they would fall on other pixels."""
    return nn.Sequential(nn.Conv2d(3, 8, 5), nn.Dropout(0.2), nn.Flatten(), nn.Linear(6272, 10))


def with_group_norm() -> nn.Module:
    """It is slower with channels last."""
    return nn.Sequential(nn.Conv2d(3, 8, 5), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(6272, 10))


def with_instance_norm() -> nn.Module:
    """So is this one."""
    return nn.Sequential(nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8), nn.Flatten(), nn.Linear(6272, 10))


def is_last(module: nn.Module) -> bool:
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_convolutions_have_channels_last() -> None:
    model = in_faster_layout(convolutions, images().train, CLASSIFICATION)
    assert is_last(model())
    assert not is_last(convolutions())


@pytest.mark.parametrize(
    "model",
    [Viewing, ReadingMemory, dropping_pixels, with_group_norm, with_instance_norm, lambda: nn.Linear(4, 2)],
)
def test_a_module_that_needs_its_own_layout_or_gains_nothing_keeps_it(model: Callable[[], nn.Module]) -> None:
    assert in_faster_layout(model, images().train, CLASSIFICATION) is model


@pytest.mark.parametrize(("engine", "last"), [("auto", True), ("serial", False)])
def test_only_the_engine_that_chooses_by_speed_changes_the_layout(engine: str, last: bool) -> None:
    assert is_last(resolve(experiment(engine)).model_alone()) is last


def test_the_runs_of_both_layouts_agree(tmp_path: Path) -> None:
    results = [run(experiment(engine), folder=tmp_path / engine, progress=False) for engine in ("auto", "serial")]
    losses = [[row["train-loss"] for row in result.rows("rounds")] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def experiment(engine: str) -> Experiment:
    return Experiment(
        name="layout", rounds=2, engine=engine, rules=["fedavg"], partition={"kind": "iid", "clients": 4},
        data={"source": f"{__name__}:images"}, model={"kind": f"{__name__}:convolutions"},
        train={"learning_rate": 0.01, "batch_size": 5},
    )  # fmt: skip
