"""A convolution of which each client has its own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corymb.simulations.engine.frequencies import Frequencies, are_worthwhile
from corymb.simulations.engine.layers import ClientLayer, StepContext
from corymb.simulations.engine.patches import Geometry, Patches, Rows
from corymb.simulations.engine.scratch import Scratch
from corymb.simulations.engine.weight_forms import DenseWeights, upto


class Way(Protocol):
    """How to convolve K clients' images `[K, B, in, H, W]` with weights of their own, `[K, out, in, h, w]`."""

    def outputs(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """The outputs `[K, B, out, H', W']` without a bias, and what `back` needs."""

    def back(self, slopes: Tensor, kept: Any, weights: Tensor, inward: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients like `weights` from the slopes of the outputs, and the slopes of the images if wanted."""


class ClientConv2d(ClientLayer):
    """`nn.Conv2d` for each client, in one of four ways.

    On a GPU: products of matrices with all clients' patches, as a kernel for each client is too small there. On a CPU:
    patches as rows where the inputs have few channels and no slopes of them are wanted; through frequencies where that
    leaves less work. Else, and wherever channels are in groups: the library's convolution client by client.
    """

    FEW = 4
    form: DenseWeights

    def __init__(self, original: nn.Conv2d, context: StepContext) -> None:
        super().__init__(original, context)
        self._ways: dict[type[Any], Way] = {}  # each with memory that it uses again
        self._shape = tuple(original.weight.shape)
        self._geometry = Geometry(
            original.kernel_size, original.stride, tuple(map(int, original.padding)), original.dilation, original.groups
        )

    def weights(self, images: Tensor) -> Tensor:
        """Of the clients that still train, `[A, out, in, h, w]`, in the precision of `images [A, ...]`."""
        weights: Tensor = self.form.like(images).unflatten(2, self._shape[1:])
        return weights

    def outputs(self, inputs: Tensor, inward: bool) -> tuple[Tensor, Any]:
        """See `ClientLayer.outputs`."""
        images = self.rounded(inputs).unflatten(0, (self.context.clients, -1))
        weights = self.weights(images)
        way = self._way(images, weights, inward)
        found, kept = way.outputs(images, weights)
        if self.bias is not None:
            found += upto(self.context.clients, self.bias.weight)[:, None, :, None, None]
        return found.flatten(0, 1), (way, kept, inputs.dtype)

    def back(self, slopes: Tensor, kept: Any, inward: bool) -> Tensor | None:
        """Learn; the slopes of the inputs if they are wanted."""
        way, kept, dtype = kept
        outer = slopes.unflatten(0, (self.context.clients, -1))
        gradient, found = way.back(outer, kept, self.weights(outer), inward)
        self.form.take(gradient.flatten(2), self.context.rate)
        self.learn_bias(outer.sum(dim=(3, 4)))
        return None if found is None else found.flatten(0, 1).to(dtype)

    def _way(self, images: Tensor, weights: Tensor, inward: bool) -> Way:
        kind = self._kind(images, weights, inward)
        if kind not in self._ways:
            self._ways[kind] = kind(self._geometry)
        return self._ways[kind]

    def _kind(self, images: Tensor, weights: Tensor, inward: bool) -> type[Any]:
        geometry = self._geometry
        if geometry.groups > 1:
            return Library
        if self.context.as_patches:
            return Patches
        if geometry.dilation == (1, 1) and weights.shape[2] <= self.FEW and not inward:
            return Rows
        return Frequencies if are_worthwhile(images.shape, weights.shape, geometry) else Library


class Library:
    """The library's convolution, client by client; it is fastest on images whose channels do not lie last."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._found, self._inner = Scratch(), Scratch()

    def outputs(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `Way`."""
        pieces = images.contiguous()
        _, stride, padding, dilation, groups = self._geometry
        shape = *images.shape[:2], *self._geometry.outputs(images.shape[3:]), weights.shape[1]
        found = self._found.of(shape, images).permute(0, 1, 4, 2, 3)  # as pooling has them fastest
        for mine, weight, into in zip(pieces, weights, found, strict=True):
            into.copy_(nn.functional.conv2d(mine, weight, None, stride, padding, dilation, groups))
        return found, pieces

    def back(self, slopes: Tensor, kept: Tensor, weights: Tensor, inward: bool) -> tuple[Tensor, Tensor | None]:
        """See `Way`."""
        _, stride, padding, dilation, groups = self._geometry
        clients, batch, inner, rows, columns = kept.shape
        outer, gradient = slopes.contiguous(), torch.empty_like(weights)
        found = self._inner.of((clients, batch, rows, columns, inner) if inward else (clients, 0), kept)
        for k, weight in enumerate(weights):
            inside, gradient[k], _ = torch.ops.aten.convolution_backward(
                outer[k], kept[k], weight, None, stride, padding, dilation, False, [0, 0], groups, [inward, True, False]
            )
            if inward:
                found[k] = inside.permute(0, 2, 3, 1)
        return gradient, found.permute(0, 1, 4, 2, 3) if inward else None
