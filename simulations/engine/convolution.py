"""A convolution of which each client has its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from corymb.simulations.engine.forms import Stacked, upto
from corymb.simulations.engine.layers import ClientLayer, Now


class ClientConv2d(ClientLayer):
    """`nn.Conv2d` for each client, in one of three ways.

    On a GPU: products of matrices with all clients' patches, as a kernel for each client is too small there. On a CPU:
    patches as rows of one batched product where the inputs have few channels and no slopes of them are wanted, else
    the library's convolution client by client.
    """

    FEW = 4
    form: Stacked

    def __init__(self, original: nn.Conv2d, now: Now) -> None:
        super().__init__(original, now)
        self.shape = tuple(original.weight.shape)
        self.stride, self.dilation = original.stride, original.dilation
        self.padding: tuple[int, ...] = tuple(map(int, original.padding))
        self.groups = original.groups
        self._windows: Any = {"dilation": self.dilation, "padding": self.padding, "stride": self.stride}
        self.as_rows = original.in_channels <= self.FEW and self.groups == 1 and self.dilation == (1, 1)

    def weights(self) -> Tensor:
        """Of the clients that still train, `[A, out, in, height, width]`."""
        weights: Tensor = upto(self.now.clients, self.form.weight).unflatten(2, self.shape[1:])
        return weights

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, Any]:
        """See `ClientLayer.outputs`."""
        clients = self.now.clients
        if self.now.as_patches and self.groups == 1:
            return self._of_patches(inputs)
        if self.as_rows and not inward:
            padded = nn.functional.pad(inputs, [p for p in reversed(self.padding) for _ in range(2)])
            windows = padded.unfold(2, self.shape[2], self.stride[0]).unfold(3, self.shape[3], self.stride[1])
            height, width = windows.shape[2:4]
            patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(clients, -1, self.form.weight.shape[2])
            found = self.form.outputs(patches)
            if self.bias is not None:
                found = found.add_(upto(self.now.clients, self.bias.weight).unsqueeze(1))
            return found.reshape(len(inputs), height, width, -1).permute(0, 3, 1, 2), patches
        pieces = inputs.contiguous().unflatten(0, (clients, -1))
        biases = [None] * clients if self.bias is None else upto(clients, self.bias.weight)
        found = _channels_last(
            nn.functional.conv2d(mine, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            for mine, weight, bias in zip(pieces, self.weights(), biases, strict=True)
        )
        return found, pieces

    def back(self, slopes: Tensor, kept: Any, inward: bool) -> Tensor | None:
        """Learn; the slopes of the inputs if they are wanted."""
        clients = self.now.clients
        if self.now.as_patches and self.groups == 1:
            return self._back_through_patches(slopes, kept, inward)
        if kept.dim() == 3:
            outer = slopes.permute(0, 2, 3, 1).reshape(clients, -1, slopes.shape[1])
            self.form.learn(outer, kept, self.now.rate)
            self.learn_bias(outer)
            return None
        outer = slopes.contiguous().unflatten(0, (clients, -1))
        found = []
        gradient = torch.empty_like(self.weights())
        for k, weight in enumerate(self.weights()):
            inner, mine, _ = torch.ops.aten.convolution_backward(
                outer[k], kept[k], weight, None, self.stride,
                self.padding, self.dilation, False, [0, 0], self.groups, [inward, True, False],
            )  # fmt: skip
            gradient[k] = mine
            found.append(inner)
        self.form.take(gradient.flatten(2), self.now.rate)
        self.learn_bias(outer.flatten(3).sum(dim=3))
        return _channels_last(found) if inward else None

    def _of_patches(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, torch.Size]]:
        patches = nn.functional.unfold(inputs, self.shape[2:], **self._windows).unflatten(0, (self.now.clients, -1))
        weights = upto(self.now.clients, self.form.weight)
        found = torch.matmul(weights.unsqueeze(1), patches)  # [K, B, out, places]
        if self.bias is not None:
            found += upto(self.now.clients, self.bias.weight)[:, None, :, None]
        rows = (inputs.shape[2] + 2 * self.padding[0] - self.dilation[0] * (self.shape[2] - 1) - 1) // self.stride[
            0
        ] + 1
        return found.flatten(0, 1).unflatten(2, (rows, -1)), (patches, inputs.shape)

    def _back_through_patches(self, slopes: Tensor, kept: tuple[Tensor, torch.Size], inward: bool) -> Tensor | None:
        patches, shape = kept
        outer = slopes.flatten(2).unflatten(0, (self.now.clients, -1))
        found = None
        if inward:
            inner = torch.matmul(upto(self.now.clients, self.form.weight).mT.unsqueeze(1), outer)
            found = nn.functional.fold(inner.flatten(0, 1), shape[2:], self.shape[2:], **self._windows)
        self.form.take(torch.einsum("kbop,kbip->koi", outer, patches), self.now.rate)
        self.learn_bias(outer.transpose(2, 3).flatten(1, 2))
        return found


def _channels_last(images: Iterable[Tensor]) -> Tensor:
    """One after another, as pooling has them fastest; the library's convolutions are faster the other way."""
    return torch.cat(list(images)).contiguous(memory_format=torch.channels_last)
