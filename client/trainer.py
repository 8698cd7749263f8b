"""Local training and evaluation of one model on one client's examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from corymb.client.batches import Batch
from corymb.protocol.train_settings import TrainSettings

Loss = Callable[[Tensor, Tensor], Tensor]


class Tally:
    """Sums of losses and correct predictions over batches.

    The sums stay on the device, so that no batch waits for a copy to the CPU.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._loss: Tensor | float = 0.0
        self._correct: Tensor | float | None = 0.0  # None if the outputs are not class scores

    def add(self, outputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add one batch, whose mean loss is `loss`."""
        self.examples += len(targets)
        self._loss = self._loss + loss.detach() * len(targets)
        if self._correct is None or outputs.dim() != targets.dim() + 1 or targets.is_floating_point():
            self._correct = None
            return
        positions = targets.numel() // max(1, len(targets))  # predictions per example: more than one in segmentation
        self._correct = self._correct + (outputs.detach().argmax(dim=1) == targets).sum() / positions

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
    tally, steps = Tally(), 0
    start = [p.detach().clone() for p in module.parameters()] if settings.proximal else []
    module.train()
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        with _precision(settings, device):
            outputs = module(inputs)
            value = loss(outputs, targets)
        optimizer.zero_grad()
        scaler.scale(value).backward()  # the scaler changes nothing unless the precision is float16
        scaler.unscale_(optimizer)
        for parameter, initial in zip(module.parameters(), start):  # noqa: B905  # no pairs without the proximal term
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - initial, alpha=settings.proximal)
        scaler.step(optimizer)
        scaler.update()
        tally.add(outputs, targets, value)
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
    tally = Tally()
    module.eval()
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        with _precision(settings or TrainSettings(), device):
            outputs = module(inputs)
            tally.add(outputs, targets, loss(outputs, targets))
    return tally.metrics() | {"seconds": time.perf_counter() - started}


def _precision(settings: TrainSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(
        device.type,
        dtype=getattr(torch, settings.precision) if settings.precision != "float32" else None,
        enabled=settings.precision != "float32",
    )
