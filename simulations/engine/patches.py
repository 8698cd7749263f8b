"""Convolutions as products of matrices: of every patch of the images with the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corymb.simulations.engine.scratch import Scratch


class Geometry(NamedTuple):
    """Of a convolution; each pair is for rows and columns."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def outputs(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the outputs for images with as many."""
        each = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                         for size, kernel, stride, pad, dilation in each)  # fmt: skip
        return rows, columns

    @property
    def margins(self) -> list[int]:
        """The padding, as `nn.functional.pad` wants it."""
        return [pad for pad in reversed(self.padding) for _ in ("before", "after")]


class Patches:
    """All clients' patches in one product, whatever the geometry, but for groups."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._windows: Any = {
            "kernel_size": geometry.kernel, "dilation": geometry.dilation,
            "padding": geometry.padding, "stride": geometry.stride,
        }  # fmt: skip

    def outputs(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """See `convolution.Way`."""
        clients, batch, inner = images.shape[:3]
        sizes = self._geometry.outputs(images.shape[3:])
        together, margins = images.flatten(0, 1), self._geometry.margins
        padded = nn.functional.pad(together, margins) if any(margins) else together  # where it would still copy
        example, channel, row, column = padded.stride()
        (down, right), (lower, further) = self._geometry.stride, self._geometry.dilation
        windows = padded.as_strided(
            (clients, inner, *self._geometry.kernel, batch, *sizes),
            (batch * example, channel, lower * row, further * column, example, down * row, right * column),
        )  # one kernel copies them; torch's unfold launches one for each image
        patches = windows.reshape(clients, weights[0, 0].numel(), -1)  # [K, in * height * width, B * places]
        found = torch.bmm(weights.flatten(2), patches).unflatten(2, (batch, *sizes))
        return found.transpose(1, 2), (patches, images.shape)

    def back(self, slopes: Tensor, kept: Any, weights: Tensor, inward: bool) -> tuple[Tensor, Tensor | None]:
        """See `convolution.Way`."""
        patches, shape = kept
        outer = slopes.transpose(1, 2).flatten(2)  # [K, out, B * places]
        gradient = torch.bmm(outer, patches.mT).view_as(weights)
        if not inward:
            return gradient, None
        inner = torch.matmul(weights.flatten(2).mT.unsqueeze(1), slopes.flatten(3)).flatten(0, 1)
        return gradient, nn.functional.fold(inner, shape[3:], **self._windows).view(shape)


class Rows:
    """Patches as rows, `[K, B * places, width * in * height]`, for few channels and where images need no slopes."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._found, self._patches = Scratch(), Scratch()

    def outputs(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `convolution.Way`; channels lie last in memory."""
        (height, width), (down, right) = self._geometry.kernel, self._geometry.stride
        clients, batch = images.shape[:2]
        rows, columns = self._geometry.outputs(images.shape[3:])
        padded = nn.functional.pad(images.flatten(0, 1), self._geometry.margins)
        # Columns of windows first, so that a patch is one stretch of memory among them.
        high = padded.unfold(2, height, down).permute(0, 2, 3, 1, 4).contiguous()  # [K * B, rows, W, in, height]
        place = high.shape[3] * height
        shape, strides = (clients * batch, rows, columns, width * place), (*high.stride()[:2], right * place, 1)
        patches = self._patches.of(shape, images).copy_(high.as_strided(shape, strides)).view(clients, -1, shape[3])
        found = self._found.of((*patches.shape[:2], weights.shape[1]), images)
        torch.bmm(patches, weights.permute(0, 4, 2, 3, 1).reshape(clients, shape[3], -1), out=found)
        return found.view(clients, batch, rows, columns, -1).permute(0, 1, 4, 2, 3), patches

    def back(self, slopes: Tensor, kept: Tensor, weights: Tensor, inward: bool) -> tuple[Tensor, None]:
        """See `convolution.Way`; it knows no way to the images."""
        outer = slopes.permute(0, 1, 3, 4, 2).reshape(len(slopes), -1, slopes.shape[2])
        clients, out, inner, height, width = weights.shape
        gradient = torch.bmm(kept.mT, outer).view(clients, width, inner, height, out)
        return gradient.permute(0, 4, 2, 3, 1), None
