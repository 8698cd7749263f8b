"""Local training and evaluation of one model on one client's examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from corymb.client.batches import Batch, on_device, outputs_and_targets, size
from corymb.protocol.train_settings import TrainSettings

Loss = Callable[[Any, Any], Tensor]
IGNORED = -100  # targets with this value do not count, as in torch's losses


def correct_share(outputs: Any, targets: Any, loss: Loss) -> Tensor | None:
    """Return how many examples of a batch are classified correctly; None if the outputs are not clearly class scores.

    Scores `[B, C]` of two or more classes with whole numbers `[B]` as targets are. With one of torch's losses for
    classes, scores `[B, C, ...]` with targets `[B, ...]` are, too; an example then counts with the share of its
    positions.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    if outputs.dim() != targets.dim() + 1 or targets.dim() < 1 or outputs.shape[1] < 2:
        return None
    is_class_loss = loss in CLASS_LOSSES or isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    if outputs.shape[0] != targets.shape[0] or (targets.dim() > 1 and not is_class_loss):
        return None
    counted = targets != IGNORED
    correct = ((outputs.detach().argmax(dim=1) == targets) & counted).sum()
    return correct * (len(targets) / counted.sum().clamp(min=1))


CLASS_LOSSES = (nn.functional.cross_entropy, nn.functional.nll_loss)


class Tally:
    """Sums of losses and correct predictions over batches.

    The sums stay on the device, so that no batch waits for a copy to the CPU.
    """

    def __init__(self, loss: Loss) -> None:
        self.examples = 0
        self._loss_function = loss
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | float | None = 0.0  # None if the outputs are not class scores

    def add(self, batch: Batch, outputs: Any, targets: Any, loss: Tensor) -> None:
        """Add one batch, whose mean loss is `loss`."""
        examples = size(batch)
        self.examples += examples
        self._loss = self._loss + loss.detach() * examples
        if self._correct is not None:
            correct = correct_share(outputs, targets, self._loss_function)
            self._correct = None if correct is None else self._correct + correct

    def metrics(self) -> dict[str, float]:
        """Return the mean loss per example and, for class scores, the accuracy; an empty dict without examples."""
        if not self.examples:
            return {}
        means = {"loss": float(self._loss) / self.examples}
        if self._correct is not None:
            means["accuracy"] = float(self._correct) / self.examples
        return means


def train(
    module: nn.Module,
    batches: Iterable[Batch],
    settings: TrainSettings,
    loss: Loss = nn.functional.cross_entropy,
    server_round: int = 1,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train `module` in place, on its own device, on `batches`; call `after_step` after each batch.

    Returns `loss` and, for class scores, `accuracy`, both as means over the examples of all batches and measured
    before the step of each batch; `steps`, the number of batches; and `seconds`, the duration.
    """
    started = time.perf_counter()
    device = next(module.parameters()).device
    optimizer = getattr(torch.optim, settings.optimizer)(
        module.parameters(), lr=settings.rate(server_round), **settings.optimizer_options
    )
    half = settings.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    tally, steps = Tally(loss), 0
    start = [p.detach().clone() for p in module.parameters()] if settings.proximal else []
    module.train()
    for each in batches:
        batch = on_device(each, device)
        with _precision(settings, device):
            outputs, targets = outputs_and_targets(module, batch)
            value = loss(outputs, targets)
        optimizer.zero_grad()
        scaler.scale(value).backward()  # the scaler changes nothing unless the precision is float16
        scaler.unscale_(optimizer)
        for parameter, initial in zip(module.parameters(), start):  # noqa: B905  # no pairs without the proximal term
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - initial, alpha=settings.proximal)
        scaler.step(optimizer)
        scaler.update()
        tally.add(batch, outputs, targets, value)
        after_step()
        steps += 1
    return tally.metrics() | {"steps": steps, "seconds": time.perf_counter() - started}


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterable[Batch],
    settings: TrainSettings | None = None,
    loss: Loss = nn.functional.cross_entropy,
) -> dict[str, float]:
    """Return the mean `loss` per example of `module` over `batches`, `accuracy` for class scores, and `seconds`."""
    started = time.perf_counter()
    device = next(module.parameters()).device
    tally = Tally(loss)
    module.eval()
    for each in batches:
        batch = on_device(each, device)
        with _precision(settings or TrainSettings(), device):
            outputs, targets = outputs_and_targets(module, batch)
            tally.add(batch, outputs, targets, loss(outputs, targets))
    return tally.metrics() | {"seconds": time.perf_counter() - started}


def _precision(settings: TrainSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(
        device.type,
        dtype=getattr(torch, settings.precision) if settings.precision != "float32" else None,
        enabled=settings.precision != "float32",
    )
