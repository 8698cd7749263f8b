"""How much work a model is: what decides whether clients are worth a block of their own."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def work_of(module: nn.Module, inputs: Tensor) -> int:
    """Return the multiplications of a forward pass through `module` for one of `inputs`.

    It is at least the number of trained parameters, each of which takes part in a step. A module that fails on
    `inputs` counts with these alone. The module's buffers may change.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), FlopCounterMode(display=False) as counter:
        with suppress(Exception):  # the user's own code; it is reported where the clients train
            module.train()(inputs)  # in training, because torch has fused layers for tests that count as nothing
        multiplications = int(counter.get_total_flops()) // 2 // len(inputs)
    return max(parameters, multiplications)
