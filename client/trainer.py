"""Local training and evaluation of one model on one client's examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from corymb.client.algorithms.algorithm import Correction, Term
from corymb.client.batches import Batch, on_device, outputs_and_targets
from corymb.client.tasks.tally import Tally
from corymb.client.tasks.task import CLASSIFICATION, Loss, Task, task_of_loss
from corymb.protocol.train_settings import TrainSettings


def train(
    module: nn.Module,
    batches: Iterable[Batch],
    settings: TrainSettings,
    loss: Loss | Task = CLASSIFICATION,
    server_round: int = 1,
    after_step: Callable[[Batch], None] = lambda batch: None,
    correction: Correction | None = None,
    term: Term | None = None,
) -> dict[str, float]:
    """Train `module` in place, on its own device, on `batches`; call `after_step` with each batch after its step.

    `correction` changes the gradient of each step, and `term` is added to the loss. Returns `loss`, without the term,
    and, for class scores, `accuracy`, both as means over the examples of all batches and measured before the step of
    each batch; `steps`, the number of batches; and `seconds`, the duration.
    """
    started = time.perf_counter()
    task = loss if isinstance(loss, Task) else task_of_loss(loss)
    device = next(module.parameters()).device
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    optimizer = None
    if trained:
        optimizer = getattr(torch.optim, settings.optimizer)(
            [parameter for _, parameter in trained], lr=settings.rate(server_round), **settings.optimizer_options
        )
    half = settings.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    tally, steps = Tally(task), 0
    pulled, offset = _terms_of(correction, trained)
    if settings.proximal:
        pulled = [*((p, p.detach().clone(), settings.proximal) for _, p in trained), *pulled]
    module.train()
    for each in batches:
        batch = on_device(each, device)
        with precision(settings, device):
            outputs, targets = outputs_and_targets(module, batch)
            value = task.loss(outputs, targets)
            total = value if term is None else value + term(module, batch, outputs)
        if optimizer is not None:
            optimizer.zero_grad()
            scaler.scale(total).backward()  # the scaler changes nothing unless the precision is float16
            scaler.unscale_(optimizer)
            for parameter, centre, pull in pulled:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - centre, alpha=pull)
            for parameter, added in offset:
                if parameter.grad is not None:
                    parameter.grad.add_(added)
            scaler.step(optimizer)
            scaler.update()
        tally.add(batch, outputs, targets, value)
        after_step(batch)
        steps += 1
    return tally.metrics() | {"steps": steps, "seconds": time.perf_counter() - started}


Trained = list[tuple[str, nn.Parameter]]


def _terms_of(
    correction: Correction | None, trained: Trained
) -> tuple[list[tuple[nn.Parameter, Tensor, float]], list[tuple[nn.Parameter, Tensor]]]:
    """Return (parameter, centre, pull) and (parameter, offset) for the parameters that a correction changes."""
    if correction is None:
        return [], []
    pull, centre = correction.pull, correction.centre
    pulled = [(p, centre[name].to(p), pull) for name, p in trained if name in centre] if pull else []
    return pulled, [(p, correction.offset[name].to(p)) for name, p in trained if name in correction.offset]


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterable[Batch],
    settings: TrainSettings | None = None,
    loss: Loss | Task = CLASSIFICATION,
) -> dict[str, float]:
    """Return the mean `loss` per example of `module` over `batches`, the task's metrics, and `seconds`.

    The metrics of a user's own loss are `accuracy`, for class scores.
    """
    started = time.perf_counter()
    tally = tested(module, batches, settings, loss if isinstance(loss, Task) else task_of_loss(loss))
    return tally.metrics() | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def tested(module: nn.Module, batches: Iterable[Batch], settings: TrainSettings | None, task: Task) -> Tally:
    """Return the tally of `module` over `batches`, with the outputs that the task's metrics need."""
    device = next(module.parameters()).device
    tally = Tally(task, keeps_outputs=True)
    module.eval()
    for each in batches:
        batch = on_device(each, device)
        with precision(settings or TrainSettings(), device):
            outputs, targets = outputs_and_targets(module, batch)
            tally.add(batch, outputs, targets, task.loss(outputs, targets))
    return tally


def precision(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """Return the context in which outputs and losses are computed in the precision of `settings`."""
    return torch.autocast(
        device.type,
        dtype=getattr(torch, settings.precision) if settings.precision != "float32" else None,
        enabled=settings.precision != "float32",
    )
