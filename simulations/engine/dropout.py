"""Dropout that draws for each client the numbers that the client would draw if it trained alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from corymb.simulations.engine.layers import ClientLayer, StepContext


class ClientDropout(ClientLayer):
    """`nn.Dropout` for K clients, each with a generator of its own."""

    by_hand = True
    needs_lengths = True

    def __init__(self, original: nn.Dropout, context: StepContext) -> None:
        super().__init__(original, context)
        self.p = original.p

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Tensor, Tensor]:
        """See `ClientLayer.outputs`. A share `p` of the inputs becomes zero, and the rest is scaled up."""
        scale = torch.zeros_like(inputs)
        by_client = scale.unflatten(0, (self.context.clients, -1))
        for target, length, generator in zip(by_client, self.context.lengths, self.context.generators, strict=False):
            if length and self.p == 0:  # draws nothing
                target[:length] = 1
            elif length:  # zero for a client that has finished
                drawn = torch.empty(target[:length].shape, dtype=inputs.dtype)
                target[:length] = drawn.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return inputs * scale, scale

    def backward(self, gradients: Tensor, saved: Tensor, needs_input_gradients: bool) -> Tensor | None:
        """See `ClientLayer.backward`."""
        return gradients * saved if needs_input_gradients else None
