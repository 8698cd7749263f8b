"""Sums of losses and correct predictions over batches, and the outputs that metrics need."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, isfinite
from typing import Any

import torch
from torch import Tensor

from corymb.client.batches import Batch, size
from corymb.client.tasks.losses import plain_outputs, plain_targets
from corymb.client.tasks.task import Task


class Tally:
    """Sums over batches. With `keeps_outputs`, also all outputs and targets, for the task's metrics.

    The sums stay on the device, so that no batch waits for a copy to the CPU.
    """

    def __init__(self, task: Task, keeps_outputs: bool = False) -> None:
        self.examples = 0
        self._task, self._keeps = task, keeps_outputs and bool(task.metrics)
        self._has_perplexity = keeps_outputs and task.has_perplexity  # a mean of perplexities has no meaning
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | float | None = 0.0  # None if the outputs are not class scores
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, batch: Batch, outputs: Any, targets: Any, loss: Tensor) -> None:
        """Add one batch, whose mean loss is `loss`."""
        examples = size(batch)
        self.examples += examples
        self._loss = self._loss + loss.detach() * examples
        if self._correct is not None:
            correct = self._task.correct(outputs, targets)
            self._correct = None if correct is None else self._correct + correct
        if self._keeps:
            kept = self._task.kept(plain_outputs(outputs).detach())
            self._kept.append((kept.float().cpu() if kept.is_floating_point() else kept.cpu(), _tensor(targets)))

    def add_all(self, others: Iterable[Tally]) -> None:
        """Add the batches of `others`, in their order."""
        for other in others:
            self.examples += other.examples
            self._loss = self._loss + other._loss
            has_both = self._correct is not None and other._correct is not None
            self._correct = self._correct + other._correct if has_both else None  # type: ignore[operator]
            self._kept += other._kept

    def metrics(self) -> dict[str, float]:
        """Return the mean loss per example and the metrics; an empty dict without examples.

        A metric that is not defined for these examples is left out.
        """
        if not self.examples:
            return {}
        found = {"loss": float(self._loss) / self.examples}
        if self._correct is not None:
            found["accuracy"] = float(self._correct) / self.examples
        if self._has_perplexity and found["loss"] < 100:
            found["perplexity"] = exp(found["loss"])
        if self._kept:
            outputs, targets = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
            for name, metric in self._task.metrics.items():
                value = float(metric(outputs, targets))
                found |= {name: value} if isfinite(value) else {}
        return found


def _tensor(targets: Any) -> Tensor:
    found: Tensor = plain_targets(targets)
    return found.detach().cpu()
