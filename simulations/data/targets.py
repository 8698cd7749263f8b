"""The targets of each kind of task: their dtype and shape, their strata, and the number of outputs of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.protocol.task_settings import TaskSettings

CLASSES = ("classification", "binary")  # kinds whose targets are class numbers
STRATA = 10  # into which numbers are divided


def class_numbers(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return `labels [n]` or `[n, 1]` as int64, `[n]`. Raises `ValueError` for fractions and other shapes."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iufb" or (labels != np.floor(labels)).any():
        raise ValueError(
            f"the labels are {labels.dtype}{[*labels.shape]}; give one class number, a whole number, per input"
        )
    return labels.astype(np.int64)


def as_targets(values: NDArray[Any], kind: str) -> Tensor:
    """Return `values` as the targets of a task of this `kind`. Raises `ValueError` if they are none.

    Classes are int64 `[n]`, of tokens and segmentation `[n, ...]`; labels 0 or 1 are int64 `[n, L]`; numbers are
    float32, `[n]` or `[n, D]`; and for survival, time and event are float32 `[n, 2]`.
    """
    if kind in CLASSES:
        classes = class_numbers(values)
        if kind == "binary" and not np.isin(classes, (0, 1)).all():
            raise ValueError("the targets of task.kind = 'binary' must be 0 or 1; data.positive_above makes them so")
        return torch.from_numpy(classes)
    if kind in ("regression", "quantile", "survival"):
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if kind == "survival" and (values.ndim != 2 or values.shape[1] != 2):
            raise ValueError(f"the targets have the shape {[*values.shape]}; survival needs [n, 2], times and events")
        return torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
    if (values != np.floor(values)).any() or (kind == "multilabel" and not np.isin(values, (0, 1)).all()):
        raise ValueError(f"the targets of task.kind = {kind!r} must be {'0 or 1' if kind == 'multilabel' else 'whole'}")
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.int64)))


def strata_of(targets: Tensor, kind: str) -> Tensor | None:
    """Return what stands for the label of each example where examples are divided by label, `[n]` int64.

    That is a tenth of the range for numbers and times, the first label for several, and the most frequent class for
    segmentation. None for classes, which are labels themselves, and for tokens, which have none.
    """
    if kind in CLASSES or kind == "tokens":
        return None
    if kind == "multilabel":
        return torch.where(targets.any(dim=1), targets.argmax(dim=1), targets.shape[1])
    if kind == "segmentation":
        return torch.tensor([int(each[each >= 0].flatten().bincount().argmax()) for each in targets])
    values = targets[:, 0] if targets.dim() > 1 else targets
    edges = torch.quantile(values[:1_000_000].double(), torch.linspace(0, 1, STRATA + 1, dtype=torch.float64)[1:-1])
    return torch.bucketize(values.double(), edges)


def outputs_of(targets: Tensor, inputs: Tensor, task: TaskSettings) -> int:
    """Return how many outputs a model has for these `targets`; for tokens, the size of the vocabulary."""
    if task.kind in ("classification", "segmentation"):
        return int(targets.max()) + 1
    if task.kind == "tokens":
        return int(max(targets.max(), inputs.max() if not inputs.is_floating_point() else 0)) + 1
    if task.kind == "quantile":
        return len(task.quantiles)
    if task.kind in ("multilabel", "regression") and targets.dim() > 1:
        return targets.shape[1]
    return 1
