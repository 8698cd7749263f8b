"""The memory layout with channels last, in which torch's convolutions train faster on a CPU than in its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from corymb.client.app import make_seeded
from corymb.client.tasks.task import Task
from corymb.simulations.data.examples import Examples
from corymb.simulations.engine.trial import trial_population

TOLERANCE = 1e-2  # of a gradient in float32, relative to its length; a wrong one differs by far more
SLOWER = (nn.GroupNorm, nn.InstanceNorm2d)  # with channels last, in training
Model = Callable[[], nn.Module]


def in_faster_layout(model: Model, store: Examples, task: Task) -> Model:
    """Return a function that makes the modules of `model` with channels last, or `model` if they gain nothing by that.

    A module may gain if it has convolutions and none of the layers `SLOWER`. It must compute the same gradients in both
    layouts on a few examples like those of `store`. One that calls `view` on the outputs of a convolution fails with
    channels last, and dropout there draws other zeros.
    """
    with torch.random.fork_rng(devices=[]):
        layers = list(model().modules())
        has_convolutions = any(isinstance(layer, nn.Conv2d) for layer in layers)
        if not has_convolutions or any(isinstance(layer, SLOWER) for layer in layers):
            return model
        try:
            plain, faster = (_gradient(each, store, task) for each in (model, partial(_with_channels_last, model)))
        except Exception:  # the model's own code runs here
            return model
    is_same = bool((faster - plain).norm() <= TOLERANCE * plain.norm())
    return partial(_with_channels_last, model) if is_same else model


def _with_channels_last(model: Model) -> nn.Module:
    return model().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _gradient(model: Model, store: Examples, task: Task) -> Tensor:
    """Return the gradient of a new module on a batch of the trial."""
    module, examples = make_seeded(model, 0).train(), trial_population(store).store
    torch.default_generator.manual_seed(0)  # for dropout
    task.loss(module(examples.inputs_at(slice(None))), examples.targets).backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])
