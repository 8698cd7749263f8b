"""Faults that users found in the client, one test each with the right value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from corymb.client import make_client_app
from corymb.client.tasks.task import correct_share
from corymb.server import FlowerStrategy
from corymb.simulations import LocalGrid
from corymb.strategies import FedAvg

BINARY = nn.functional.binary_cross_entropy_with_logits
cross_entropy = nn.functional.cross_entropy


def run(
    model: Callable[[], nn.Module], data: Callable[[Context], Any], nodes: int = 2, **options: Any
) -> FlowerStrategy:
    """Run one round with training and evaluation on the same data."""
    torch.manual_seed(0)
    strategy = FlowerStrategy(FedAvg(), min_available_nodes=1)
    app = make_client_app(model, lambda context: (data(context), data(context)), **options)
    strategy.start(LocalGrid(app, 2), ArrayRecord(model().state_dict()), num_rounds=1)
    return strategy


def test_s4_accuracy_only_where_outputs_are_class_scores() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert correct_share(scores, torch.tensor([1, 0, 0]), cross_entropy) == 2
    assert correct_share(scores[:, :1], torch.tensor([1, 0, 0]), BINARY) is None  # one logit
    assert correct_share(scores, scores.round(), BINARY) is None
    tokens, targets = torch.randn(2, 4, 4), torch.randint(0, 4, (2, 4))  # as many positions as words

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    assert correct_share(tokens, targets, loss) is None
    correct = (tokens.argmax(dim=1) == targets).float().mean(dim=1).sum()  # torch's own order, [B, C, T]
    torch.testing.assert_close(correct_share(tokens, targets, cross_entropy), correct)
    assert correct_share(scores, torch.tensor([1, -100, 0]), cross_entropy) == 1 * 3 / 2


def test_s5_a_client_counts_the_examples_that_it_uses() -> None:
    """A sampler with 90 and 10 of 100 rows: weights .9 and .1; evaluation counts what it saw."""
    dataset = TensorDataset(torch.randn(100, 3), torch.randint(0, 2, (100,)))

    def data(context: Context) -> DataLoader[Any]:
        rows = range(90) if context.node_config["partition-id"] == 0 else range(90, 100)
        return DataLoader(dataset, 10, sampler=SubsetRandomSampler(list(rows)))

    strategy = run(lambda: nn.Linear(3, 2), data)
    assert [v.examples for v in strategy.record.admitted] == [90, 10]
    assert [v.weight for v in strategy.record.admitted] == pytest.approx([0.9, 0.1])
    assert [v.examples for v in strategy.record.evaluations] == [90, 10]


@pytest.mark.parametrize(("drop_last", "expected"), [(True, 90), (False, 95)])
def test_s5_a_dropped_batch_does_not_count(drop_last: bool, expected: int) -> None:
    dataset = TensorDataset(torch.randn(95, 3), torch.randint(0, 2, (95,)))
    strategy = run(lambda: nn.Linear(3, 2), lambda context: DataLoader(dataset, 10, drop_last=drop_last))
    assert [v.examples for v in strategy.record.admitted] == [expected, expected]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Twenty examples without a length."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            x = torch.randn(3, generator=generator)
            yield x, (x.sum() > 0).long()


class Dicts(Dataset[dict[str, Tensor]]):
    """Examples as dicts, as Hugging Face's models take them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x = torch.full((3,), float(row % 2))
        return {"x": x, "labels": torch.tensor(row % 2)}


class FromDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.linear(x)
        return {"scores": scores, "loss": cross_entropy(scores, labels)}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(one + two), two


def test_e2_what_the_loss_takes_is_enough() -> None:
    streamed = run(lambda: nn.Linear(3, 2), lambda context: DataLoader(Stream(), 8))
    assert [v.examples for v in streamed.record.admitted] == [20, 20]
    dicts = run(FromDict, lambda context: Dicts(), loss=lambda outputs, batch: outputs["loss"])
    assert [v.code for v in dicts.record.verdicts] == ["admitted", "admitted"]
    assert "accuracy" not in dicts.record.train
    x = torch.randn(10, 3)
    several = TensorDataset(x, x, (x.sum(dim=1) > 0).long())
    pairs = run(TwoInputs, lambda context: several, loss=lambda outputs, targets: cross_entropy(outputs[0], targets))
    assert [v.examples for v in pairs.record.admitted] == [10, 10]


def test_q1_a_last_batch_of_one_does_not_fail_with_batch_norm() -> None:
    """Eleven and twenty-two examples in batches of ten; a single example alone cannot be normalised."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def data(context: Context) -> TensorDataset:
        count = 11 * (1 + int(context.node_config["partition-id"]))
        return TensorDataset(torch.randn(count, 3), torch.randint(0, 2, (count,)))

    torch.manual_seed(0)
    app = make_client_app(model, lambda context: (data(context), None))
    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0)
    grid = LocalGrid(app, 2, run_config={"train.batch_size": 10})
    strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=1)
    assert [(v.code, v.metrics["steps"]) for v in strategy.record.verdicts] == [("admitted", 1), ("admitted", 3)]
