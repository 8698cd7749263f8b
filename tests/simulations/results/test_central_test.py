"""The central test gives the same numbers on any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from corymb.client import evaluate
from corymb.client.batches import evaluation_batches
from corymb.simulations.data.examples import Examples
from corymb.simulations.results.central_test import CentralTest


class Remembering(nn.Module):
    """Keeps its inputs until it has used them, as a module may that only one thread runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept = inputs
        scores: Tensor = self.body(self.kept * 1.0)
        return scores + 0 * self.kept.flatten(1)[:, :3]


def examples(count: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, 4, generator=generator)
    return Examples(inputs, torch.randint(0, 3, (count,), generator=generator))


@pytest.mark.parametrize("count", [7, 1024, 5000])
def test_any_number_of_threads_gives_the_same_numbers(count: int) -> None:
    torch.manual_seed(0)
    module, data = Remembering(), examples(count)
    tests = [CentralTest(module, data, threads) for threads in (1, 2, 5)]
    for _ in range(2):
        results = [test.metrics() for test in tests]
        assert results[0] == results[1] == results[2]
        whole = evaluate(module, evaluation_batches(TensorDataset(data.inputs, data.targets)))
        assert results[0]["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-12)
        assert results[0]["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        with torch.no_grad():  # a new model in the same module reaches the copies too
            next(module.parameters()).mul_(1.5)


def test_pixels_of_bytes_are_scaled_as_in_training() -> None:
    """A validation part comes from the training examples, which may be bytes."""
    torch.manual_seed(0)
    module, floats = Remembering(), examples(20)
    pixels = (torch.arange(20 * 16) % 256).to(torch.uint8).view(20, 4, 4)
    raw = Examples(pixels, floats.targets, scaled=(0.2, 0.5))
    scaled = Examples((pixels.float() / 255 - 0.2) / 0.5, floats.targets)
    first, second = CentralTest(module, raw, 1).metrics(), CentralTest(module, scaled, 1).metrics()
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
