"""Losses and metrics of tasks against torch, scikit-learn and values worked out by hand."""

from __future__ import annotations

from math import exp, log
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn

from corymb.client import evaluate, train
from corymb.client.tasks.tally import Tally
from corymb.client.tasks.task import make_task
from corymb.protocol.task_settings import METRICS, TaskSettings
from corymb.protocol.train_settings import TrainSettings

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def measured(kind: str, outputs: Tensor, targets: Tensor, **settings: Any) -> dict[str, float]:
    """Return the metrics over two batches, which must equal those over one."""
    task = make_task(TaskSettings(kind=kind, **settings))
    found = []
    for cut in ([len(outputs)], [len(outputs) // 2, len(outputs) - len(outputs) // 2]):
        tally = Tally(task, keeps_outputs=True)
        for o, t in zip(outputs.split(cut), targets.split(cut), strict=True):
            tally.add((o, t), o, t, task.loss(o, t))
        found.append(tally.metrics())
    if kind != "survival":  # whose loss is over all pairs of a batch
        assert found[0] == pytest.approx(found[1])
    return found[0]


def test_classification() -> None:
    outputs, targets = randn(40, 3), torch.arange(40) % 3
    names = ["accuracy", "balanced-accuracy", "f1", "auroc", "ece"]
    found = measured("classification", outputs, targets, metrics=names)
    predicted, chances = outputs.argmax(dim=1), outputs.double().softmax(dim=1)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, targets)))
    assert found["accuracy"] == sk.accuracy_score(targets, predicted)
    assert found["balanced-accuracy"] == pytest.approx(sk.balanced_accuracy_score(targets, predicted))
    assert found["f1"] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    # One class against the others, by its own score, as a researcher reads a model's outputs.
    areas = [sk.roc_auc_score(targets == c, outputs[:, c]) for c in range(3)]
    assert found["auroc"] == pytest.approx(np.mean(areas))
    confidence = chances.max(dim=1).values.numpy()
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            correct = (predicted == targets).numpy()[inside].mean()
            expected += inside.mean() * abs(correct - confidence[inside].mean())
    assert found["ece"] == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_binary(shape: tuple[int, ...]) -> None:
    outputs, targets = randn(*shape), torch.arange(50) % 2
    found = measured("binary", outputs, targets)
    flat = outputs.reshape(-1)
    assert found["loss"] == pytest.approx(float(nn.functional.binary_cross_entropy_with_logits(flat, targets.float())))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(targets, flat))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, flat > 0))
    assert found["f1"] == pytest.approx(sk.f1_score(targets, flat > 0))
    assert found["balanced-accuracy"] == pytest.approx(sk.balanced_accuracy_score(targets, flat > 0))


def test_a_metric_that_is_not_defined_is_left_out() -> None:
    found = measured("binary", randn(10), torch.ones(10).long())
    assert "auroc" not in found
    assert "accuracy" in found
    assert "r2" not in measured("regression", randn(4), torch.ones(4))


def test_multilabel() -> None:
    outputs, targets = randn(30, 4), (randn(30, 4) > 0).long()
    found = measured("multilabel", outputs, targets)
    assert found["loss"] == pytest.approx(
        float(nn.functional.binary_cross_entropy_with_logits(outputs, targets.float()))
    )
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(targets, outputs, average="macro"))
    assert found["f1"] == pytest.approx(sk.f1_score(targets, outputs > 0, average="macro"))
    assert found["accuracy"] == pytest.approx(float(((outputs > 0) == targets.bool()).double().mean()))


@pytest.mark.parametrize("shape", [(25, 1), (25,), (25, 3)])
def test_regression(shape: tuple[int, ...]) -> None:
    outputs = randn(*shape)
    targets = randn(*shape) if shape != (25, 1) else randn(25)
    found = measured("regression", outputs, targets)
    flat = outputs.reshape(targets.shape)
    assert found["loss"] == pytest.approx(sk.mean_squared_error(targets, flat))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(targets, flat))
    assert found["rmse"] == pytest.approx(np.sqrt(sk.mean_squared_error(targets, flat)))
    assert found["r2"] == pytest.approx(sk.r2_score(targets, flat), abs=1e-5)


def test_a_regression_with_targets_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"outputs have the shape \[5, 2\] and the targets \[5\]"):
        make_task(TaskSettings(kind="regression")).loss(randn(5, 2), randn(5))


def test_quantiles() -> None:
    outputs, targets = randn(40, 3).sort(dim=1).values, randn(40)
    found = measured("quantile", outputs, targets, quantiles=[0.1, 0.5, 0.9])
    each = [sk.mean_pinball_loss(targets, outputs[:, i], alpha=a) for i, a in enumerate((0.1, 0.5, 0.9))]
    assert found["pinball"] == pytest.approx(np.mean(each))
    assert found["loss"] == pytest.approx(np.mean(each))
    inside = (targets >= outputs[:, 0]) & (targets <= outputs[:, 2])
    assert found["coverage"] == pytest.approx(float(inside.double().mean()))
    with pytest.raises(ValueError, match="2 outputs for 3 quantiles"):
        make_task(TaskSettings(kind="quantile")).loss(randn(5, 2), randn(5))
    with pytest.raises(ValueError, match="must rise strictly between 0 and 1"):
        TaskSettings(kind="quantile", quantiles=[0.5, 0.1])


def test_segmentation() -> None:
    outputs, targets = randn(6, 4, 5, 5), torch.randint(0, 3, (6, 5, 5), generator=GENERATOR)
    found = measured("segmentation", outputs, targets)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, targets)))
    predicted = outputs.argmax(dim=1)
    scores = sk.jaccard_score(targets.flatten(), predicted.flatten(), labels=[0, 1, 2], average="macro")
    assert found["miou"] == pytest.approx(scores)
    assert found["accuracy"] == pytest.approx(float((predicted == targets).double().mean()))


def test_tokens() -> None:
    outputs, targets = randn(6, 8, 11), torch.randint(0, 11, (6, 8), generator=GENERATOR)
    found = measured("tokens", outputs, targets)
    loss = float(nn.functional.cross_entropy(outputs.reshape(-1, 11), targets.reshape(-1)))
    assert found["loss"] == pytest.approx(loss)
    assert found["perplexity"] == pytest.approx(exp(loss))
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(dim=2) == targets).double().mean()))


def test_tokens_that_are_ignored_do_not_count() -> None:
    outputs = randn(2, 3, 5)
    targets = torch.tensor([[1, -100, -100], [2, 3, -100]])
    first = nn.functional.cross_entropy(outputs[0, :1], targets[0, :1])
    second = nn.functional.cross_entropy(outputs[1, :2], targets[1, :2])
    assert float(make_task(TaskSettings(kind="tokens")).loss(outputs, targets)) == pytest.approx(
        float(first + second) / 2
    )


def test_survival_by_hand() -> None:
    """Cox 1972 for three examples: the events at times 1 and 2, the third is censored at time 3."""
    hazards = torch.tensor([0.5, -0.2, 0.1])
    targets = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 0.0]])
    first = log(exp(0.5) + exp(-0.2) + exp(0.1)) - 0.5
    second = log(exp(-0.2) + exp(0.1)) + 0.2
    found = measured("survival", hazards[:, None], targets)
    assert found["loss"] == pytest.approx((first + second) / 2)
    # Pairs whose order is known: (1, 2), (1, 3) and (2, 3); the hazard falls in the first two of them.
    assert found["c-index"] == pytest.approx(2 / 3)


def test_every_kind_learns_from_its_loss() -> None:
    """A linear model improves its loss on noise in a few steps, for every kind."""
    inputs = randn(32, 6)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "classification": (nn.Linear(6, 3), torch.arange(32) % 3),
        "binary": (nn.Linear(6, 1), torch.arange(32) % 2),
        "multilabel": (nn.Linear(6, 2), (randn(32, 2) > 0).long()),
        "regression": (nn.Linear(6, 1), randn(32)),
        "quantile": (nn.Linear(6, 3), randn(32)),
        "segmentation": (
            nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2))),
            torch.randint(0, 2, (32, 2, 2), generator=GENERATOR),
        ),
        "tokens": (
            nn.Sequential(nn.Linear(6, 10), nn.Unflatten(1, (2, 5))),
            torch.randint(0, 5, (32, 2), generator=GENERATOR),
        ),
        "survival": (nn.Linear(6, 1), torch.stack([randn(32).exp(), torch.ones(32)], dim=1)),
    }
    assert cases.keys() == METRICS.keys()
    settings = TrainSettings(learning_rate=0.05)
    for kind, (module, targets) in cases.items():
        task = make_task(TaskSettings(kind=kind))
        before = evaluate(module, [(inputs, targets)], settings, task)
        assert set(METRICS[kind]) <= before.keys(), kind
        train(module, [(inputs, targets)] * 20, settings, task)
        assert evaluate(module, [(inputs, targets)], settings, task)["loss"] < before["loss"], kind


def double(outputs: Tensor, targets: Tensor) -> Tensor:
    return 2 * (outputs.squeeze(-1) - targets).square().mean()


def largest(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.squeeze(-1) - targets).abs().max())


def test_a_loss_and_metrics_of_ones_own() -> None:
    outputs, targets = randn(9, 1), randn(9)
    settings = TaskSettings(kind="regression", loss=f"{__name__}:double", metrics=[f"{__name__}:largest", "mae"])
    assert settings.metric_names == ("largest", "mae")
    task = make_task(settings)
    tally = Tally(task, keeps_outputs=True)
    tally.add((outputs, targets), outputs, targets, task.loss(outputs, targets))
    found = tally.metrics()
    assert found["loss"] == pytest.approx(2 * sk.mean_squared_error(targets, outputs))
    assert found["largest"] == pytest.approx(largest(outputs, targets))
    with pytest.raises(ValueError, match=r"metric 'aurocc' is unknown; choose one of accuracy, auroc"):
        make_task(TaskSettings(metrics=["aurocc"]))


def test_outputs_may_be_objects_dicts_and_tuples() -> None:
    outputs, targets = randn(4, 3), torch.tensor([0, 1, 2, 0])
    task = make_task(TaskSettings(kind="multilabel"))
    labels = nn.functional.one_hot(targets)
    expected = task.loss(outputs, labels)
    for made in (SimpleNamespace(logits=outputs), {"logits": outputs}, (outputs, None)):
        assert torch.equal(task.loss(made, labels), expected)
    assert torch.equal(task.loss(outputs, {"input": outputs, "labels": labels}), expected)


def test_settings_survive_the_run_config() -> None:
    settings = TaskSettings(kind="quantile", quantiles=[0.25, 0.75], metrics=["coverage"])
    assert TaskSettings.read(settings.flat()) == settings
    with pytest.raises(ValueError, match=r"task.knd is not a known key"):
        TaskSettings.read({"task.knd": 1})
