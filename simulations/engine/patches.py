"""Convolutions as matrix products of the kernels with every patch of the images."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Geometry(NamedTuple):
    """The parameters of a convolution; each pair is for rows and columns."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of the outputs, given those of the images."""
        each = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                         for size, kernel, stride, pad, dilation in each)  # fmt: skip
        return rows, columns

    @property
    def margins(self) -> list[int]:
        """The padding as `nn.functional.pad` expects it."""
        return [pad for pad in reversed(self.padding) for _ in ("before", "after")]


class PatchColumns:
    """One matrix product for the patches of all clients, for any geometry without groups."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._windows: Any = {
            "kernel_size": geometry.kernel, "dilation": geometry.dilation,
            "padding": geometry.padding, "stride": geometry.stride,
        }  # fmt: skip

    def forward(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """See `convolution.ConvMethod`."""
        clients, batch, in_channels = images.shape[:3]
        sizes = self._geometry.output_size(images.shape[3:])
        merged, margins = images.flatten(0, 1), self._geometry.margins
        padded = nn.functional.pad(merged, margins) if any(margins) else merged  # `pad` copies even without margins
        example, channel, row, column = padded.stride()
        (row_stride, column_stride), (row_dilation, column_dilation) = self._geometry.stride, self._geometry.dilation
        windows = padded.as_strided(
            (clients, in_channels, *self._geometry.kernel, batch, *sizes),
            (
                batch * example,
                channel,
                row_dilation * row,
                column_dilation * column,
                example,
                row_stride * row,
                column_stride * column,
            ),
        )  # `reshape` copies them in one kernel; torch's `unfold` launches one kernel per image
        patches = windows.reshape(clients, weights[0, 0].numel(), -1)  # [K, in * height * width, B * positions]
        outputs = torch.bmm(weights.flatten(2), patches).unflatten(2, (batch, *sizes))
        return outputs.transpose(1, 2), (patches, images.shape)

    def backward(
        self, gradients: Tensor, saved: Any, weights: Tensor, needs_input_gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `convolution.ConvMethod`."""
        patches, shape = saved
        columns = gradients.transpose(1, 2).flatten(2)  # [K, out, B * positions]
        weight_gradient = torch.bmm(columns, patches.mT).view_as(weights)
        if not needs_input_gradients:
            return weight_gradient, None
        patch_gradients = torch.matmul(weights.flatten(2).mT.unsqueeze(1), gradients.flatten(3)).flatten(0, 1)
        return weight_gradient, nn.functional.fold(patch_gradients, shape[3:], **self._windows).view(shape)


class PatchRows:
    """Patches as rows `[K, B * positions, width * in * height]`, for few channels; no gradients of the images."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry

    def forward(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `convolution.ConvMethod`; the outputs lie in memory with channels last."""
        (height, width), (row_stride, column_stride) = self._geometry.kernel, self._geometry.stride
        clients, batch = images.shape[:2]
        rows, columns = self._geometry.output_size(images.shape[3:])
        padded = nn.functional.pad(images.flatten(0, 1), self._geometry.margins)
        # Image columns lie before channels, so that every patch is one contiguous stretch of memory.
        strips = (
            padded.unfold(2, height, row_stride).permute(0, 2, 3, 1, 4).contiguous()
        )  # [K * B, rows, W, in, height]
        column_size = strips.shape[3] * height
        shape, strides = (
            (clients * batch, rows, columns, width * column_size),
            (*strips.stride()[:2], column_stride * column_size, 1),
        )
        patches = strips.as_strided(shape, strides).reshape(clients, -1, shape[3])
        outputs = torch.bmm(patches, weights.permute(0, 4, 2, 3, 1).reshape(clients, shape[3], -1))
        return outputs.view(clients, batch, rows, columns, -1).permute(0, 1, 4, 2, 3), patches

    def backward(
        self, gradients: Tensor, saved: Tensor, weights: Tensor, needs_input_gradients: bool
    ) -> tuple[Tensor, None]:
        """See `convolution.ConvMethod`; never returns gradients of the images."""
        gradient_rows = gradients.permute(0, 1, 3, 4, 2).reshape(len(gradients), -1, gradients.shape[2])
        clients, out_channels, in_channels, height, width = weights.shape
        weight_gradient = torch.bmm(saved.mT, gradient_rows).view(clients, width, in_channels, height, out_channels)
        return weight_gradient.permute(0, 4, 2, 3, 1), None
