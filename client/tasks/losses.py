"""The losses of the kinds of tasks, each as one loss per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # targets with this value do not count, as in torch's losses


def plain_outputs(outputs: Any) -> Any:
    """Return the tensor in a model's outputs: the entry `logits` of a dict or object, or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    if isinstance(outputs, (tuple, list)) and outputs:
        return plain_outputs(outputs[0])
    return getattr(outputs, "logits", outputs)


def plain_targets(targets: Any) -> Any:
    """Return the targets of a batch; those of a batch that is a dict are its entry `labels`, or `label`."""
    if isinstance(targets, Mapping):
        return targets.get("labels", targets.get("label", targets))
    return targets


def like_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return `outputs [B, 1]` as `[B]` if the targets are `[B]`."""
    return outputs.squeeze(-1) if outputs.dim() == targets.dim() + 1 and outputs.shape[-1] == 1 else outputs


def _per_example(losses: Tensor) -> Tensor:
    return losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses


def classification(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of scores `[B, C]` or `[B, C, ...]` with class numbers `[B]` or `[B, ...]`.

    The loss of an example is the mean over its positions that are not -100.
    """
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none", ignore_index=IGNORED)
    if losses.dim() == 1:
        return losses
    counted = (targets != IGNORED).flatten(1)
    return losses.flatten(1).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of scores `[B, T, V]` with the tokens `[B, T]` that come next; see `classification`."""
    return classification(outputs.transpose(1, -1), targets)


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits `[B]`, `[B, 1]` or `[B, L]` with targets 0 or 1 of the shape `[B]` or `[B, L]`."""
    outputs = like_targets(outputs, targets)
    losses = nn.functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
    return _per_example(losses)


def regression(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of outputs `[B]`, `[B, 1]` or `[B, D]`, with targets `[B]` or `[B, D]`."""
    outputs = like_targets(outputs, targets)
    _require_same_shape(outputs, targets)
    return _per_example((outputs - targets.to(outputs.dtype)).square())


def quantile(outputs: Tensor, targets: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Pinball loss of the outputs `[B, Q]`, one per quantile, with targets `[B]` (Koenker & Bassett 1978)."""
    levels = torch.tensor(quantiles, dtype=outputs.dtype, device=outputs.device)
    if outputs.shape[-1] != len(levels):
        raise ValueError(f"The model has {outputs.shape[-1]} outputs for {len(levels)} quantiles; give one for each.")
    errors = targets.reshape(-1, 1).to(outputs.dtype) - outputs
    return torch.maximum(levels * errors, (levels - 1) * errors).mean(dim=1)


def survival(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus Cox's log partial likelihood, a scalar, with Breslow's ties (Cox 1972, Breslow 1974).

    `outputs [B]` or `[B, 1]` are log hazards; `targets [B, 2]` are the time of an example and 1 if its event was
    observed, 0 if it was censored. The loss is the mean over the observed events of the batch; 0 without any.
    """
    hazards, (times, events) = outputs.reshape(-1), targets.to(outputs.dtype).unbind(dim=1)
    at_risk = times[None, :] >= times[:, None]
    totals = hazards[None, :].expand(len(hazards), -1).masked_fill(~at_risk, -torch.inf).logsumexp(dim=1)
    return ((totals - hazards) * events).sum() / events.sum().clamp(min=1)


def _require_same_shape(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(
            f"The outputs have the shape {list(outputs.shape)} and the targets {list(targets.shape)}; make them equal."
        )
