"""Metrics of all outputs and targets of an evaluation, from scikit-learn where it has them.

A metric takes outputs and targets as the model and the data give them, on the CPU, and returns a number; NaN if it is
not defined, such as an AUROC where all examples have the same class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import nan

import torch
from torch import Tensor

from corymb.client.tasks.losses import like_targets
from corymb.client.tasks.losses import quantile as pinball_losses

Metric = Callable[[Tensor, Tensor], float]
BINS = 15  # of the calibration error, as in Guo et al. 2017


def _is_binary(outputs: Tensor, targets: Tensor) -> bool:
    return like_targets(outputs, targets).shape == targets.shape


def _classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the predicted classes, of the shape of `targets`: of logits of one class, or of scores of several."""
    if _is_binary(outputs, targets):
        return (like_targets(outputs, targets) > 0).long()
    return outputs.argmax(dim=1)


def balanced_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean recall over the classes that occur."""
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about predicted classes that do not occur
        return float(balanced_accuracy_score(targets.long(), _classes(outputs, targets)))


def f1(outputs: Tensor, targets: Tensor) -> float:
    """Return the F1 score of the positive class; for several classes or labels, the mean over them."""
    from sklearn.metrics import f1_score

    is_single = _is_binary(outputs, targets) and targets.dim() == 1
    average = "binary" if is_single else "macro"
    return float(f1_score(targets.long(), _classes(outputs, targets), average=average, zero_division=0.0))


def auroc(outputs: Tensor, targets: Tensor) -> float:
    """Return the area under the ROC curve; for several classes or labels, the mean over those that have both values."""
    from sklearn.metrics import roc_auc_score

    if _is_binary(outputs, targets):
        scores = like_targets(outputs, targets).reshape(len(targets), -1)
        truths = targets.reshape(len(targets), -1).long()
    else:
        scores, truths = outputs, torch.nn.functional.one_hot(targets, outputs.shape[1])
    areas = [
        float(roc_auc_score(truth, score))
        for truth, score in zip(truths.unbind(1), scores.unbind(1), strict=True)
        if 0 < int(truth.sum()) < len(truth)
    ]
    return sum(areas) / len(areas) if areas else nan


def ece(outputs: Tensor, targets: Tensor) -> float:
    """Return the expected calibration error over 15 bins of equal width (Guo et al. 2017, eq. 5)."""
    if _is_binary(outputs, targets):
        positive = like_targets(outputs, targets).double().sigmoid().flatten()
        confidence, correct = torch.maximum(positive, 1 - positive), (positive > 0.5) == (targets.flatten() > 0.5)
    else:
        confidence, predicted = outputs.double().softmax(dim=1).max(dim=1)
        confidence, correct = confidence.flatten(), (predicted == targets).flatten()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence - correct.double())
    return float(gaps.abs().sum()) / max(1, len(confidence))


def miou(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean intersection over union of the classes that occur; `outputs` are predicted classes."""
    from sklearn.metrics import jaccard_score

    counted = targets != -100
    truths, predicted = targets[counted], outputs[counted]
    return float(jaccard_score(truths, predicted, labels=truths.unique().numpy(), average="macro", zero_division=0.0))


def mae(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean absolute error."""
    return float((like_targets(outputs, targets).double() - targets.double()).abs().mean())


def rmse(outputs: Tensor, targets: Tensor) -> float:
    """Return the root of the mean squared error."""
    return float((like_targets(outputs, targets).double() - targets.double()).square().mean().sqrt())


def r2(outputs: Tensor, targets: Tensor) -> float:
    """Return the coefficient of determination; NaN for fewer than two examples or equal targets."""
    from sklearn.metrics import r2_score

    if len(targets) < 2 or bool((targets == targets[0]).all()):
        return nan
    return float(r2_score(targets.double(), like_targets(outputs, targets).double()))


def pinball(outputs: Tensor, targets: Tensor, quantiles: Sequence[float]) -> float:
    """Return the mean pinball loss over examples and quantiles."""
    return float(pinball_losses(outputs.double(), targets, quantiles).mean())


def coverage(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of targets between the lowest and the highest predicted quantile."""
    values = targets.reshape(-1)
    return float(((values >= outputs[:, 0]) & (values <= outputs[:, -1])).double().mean())


def c_index(outputs: Tensor, targets: Tensor) -> float:
    """Return Harrell's concordance index (Harrell et al. 1982); no library that we use has it.

    Of the pairs whose order in time is known, it is the share in which the earlier event has the higher hazard;
    pairs of equal hazards count half. NaN if there is no such pair.
    """
    hazards, (times, events) = outputs.double().reshape(-1), targets.double().unbind(dim=1)
    known = (times[:, None] < times[None, :]) & (events[:, None] > 0)
    higher = (hazards[:, None] > hazards[None, :]).double() + 0.5 * (hazards[:, None] == hazards[None, :]).double()
    return float((higher * known).sum() / known.sum()) if bool(known.any()) else nan


def named_metrics(quantiles: Sequence[float]) -> dict[str, Metric]:
    """Return the metrics that need all outputs, by name. Accuracy and perplexity are sums over batches; see `Tally`."""
    return {
        "balanced-accuracy": balanced_accuracy, "f1": f1, "auroc": auroc, "ece": ece, "miou": miou, "mae": mae,
        "rmse": rmse, "r2": r2, "pinball": partial(pinball, quantiles=quantiles), "coverage": coverage,
        "c-index": c_index,
    }  # fmt: skip
