"""Convolutions with fewer multiplications, through a Fourier transform along the rows of an image.

A direct convolution of n rows with a kernel of k rows takes about n * k products. After a discrete Fourier transform
each frequency takes one complex product (Cooley and Tukey 1965), which Gauss's method computes with three real
products. So about 1.5 (n + padding) products remain: a third of the direct ones for a 5 by 5 kernel. The transforms
themselves are products with small matrices. Rounding errors are about as large as in a direct convolution, but they
are relative to the largest number in a column of an image, not in a window. Columns are not transformed but cut into
windows.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from corymb.simulations.engine.patches import Geometry

TRANSFORM_COST = 4  # cost of an operation of a transform, in operations of a matrix product
MAX_COST_RATIO = 0.75  # use the transform only if it costs less than this share of a direct convolution
MAX_SAVED = 1 << 26  # numbers of weights and images that are kept from the forward to the backward pass


def real_products(period: int) -> int:
    """Return the number of real products for `period` rows, zeros included: 3 per frequency, 1 if it is real."""
    return 3 * (period // 2) + (1 if period % 2 else -1)


@lru_cache(maxsize=64)
def transforms(rows: int, kernel: int, padding: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return S `[R, rows]`, V `[R, kernel]` and T `[R, out]` such that `T' (S x * V w)` is x convolved with w."""
    period = rows + padding  # the convolution is circular, so the zeros at one end serve the other end too
    row_positions = torch.arange(rows, dtype=torch.float64)
    kernel_positions = torch.arange(kernel, dtype=torch.float64) - padding
    output_positions = torch.arange(rows + 2 * padding - kernel + 1, dtype=torch.float64)
    image_rows, kernel_rows, output_rows = [], [], []
    for frequency in range(period // 2 + 1):
        angle = 2 * math.pi * frequency / period
        a, b = torch.cos(angle * row_positions), -torch.sin(angle * row_positions)
        c, d = torch.cos(angle * kernel_positions), torch.sin(angle * kernel_positions)
        cos, sin = torch.cos(angle * output_positions), torch.sin(angle * output_positions)
        if frequency == 0 or 2 * frequency == period:  # real
            image_rows.append(a)
            kernel_rows.append(c)
            output_rows.append(cos / period)
        else:  # (a + bi)(c + di) = (c(a + b) - b(c + d)) + (c(a + b) + a(d - c))i
            image_rows += [a + b, a, b]
            kernel_rows += [c, d - c, c + d]
            output_rows += [2 / period * (cos - sin), -2 / period * sin, -2 / period * cos]
    return torch.stack(image_rows).to(dtype), torch.stack(kernel_rows).to(dtype), torch.stack(output_rows).to(dtype)


def fourier_is_cheaper(images: torch.Size, weights: torch.Size, geometry: Geometry) -> bool:
    """Return whether `FourierConv` takes fewer operations than a direct convolution.

    The arguments are the shapes of `images [K, B, in, H, W]` and `weights [K, out, in, h, w]`. Returns False for
    strides or dilation other than one, for outputs larger than the images, and for more than `MAX_SAVED` numbers to
    keep.
    """
    if geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return False
    padding, (clients, batch, in_channels, rows, columns) = geometry.padding, images
    out_channels, height, width = weights[1], *weights[3:]
    if any(2 * pad > size - 1 for pad, size in zip(padding, (height, width), strict=True)):
        return False
    out_rows, out_columns = rows + 2 * padding[0] - height + 1, columns + 2 * padding[1] - width + 1
    products = real_products(rows + padding[0])
    if clients * products * in_channels * (width * out_channels + batch * columns) > MAX_SAVED:
        return False
    direct = 3 * out_rows * out_columns * height * width * in_channels * out_channels
    fourier = 3 * products * out_columns * width * in_channels * out_channels
    fourier += TRANSFORM_COST * 2 * products * (rows * columns * in_channels + out_rows * out_columns * out_channels)
    fourier += TRANSFORM_COST * 3 * products * height * width * in_channels * out_channels // max(1, batch)
    return fourier < MAX_COST_RATIO * direct


class FourierConv:
    """Convolutions with strides of one, client by client; see `convolution.ConvMethod`."""

    def __init__(self, geometry: Geometry) -> None:
        (self._height, self._width), (self._row_padding, self._padding) = geometry.kernel, geometry.padding

    def forward(self, images: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `ConvMethod`; saves the transformed images `[K, B, R, W, in]` and weights `[K, R, w * in, out]`."""
        clients, batch, in_channels, height, columns = images.shape
        self._of_image, self._of_kernel, self._of_output = transforms(
            height, self._height, self._row_padding, images.dtype
        )
        out_channels, out_columns = weights.shape[1], columns + 2 * self._padding - self._width + 1
        products = len(self._of_image)
        outputs = images.new_empty(clients, batch, self._of_output.shape[1], out_columns, out_channels)
        weight_transforms = images.new_empty(clients, products, self._width * in_channels, out_channels)
        padded = nn.functional.pad(images.permute(0, 1, 3, 4, 2), (0, 0, self._padding, self._padding))
        image_transforms = images.new_empty(clients, batch, products, *padded.shape[3:])
        for k, client_images in enumerate(padded):
            torch.bmm(
                self._of_image.expand(batch, -1, -1), client_images.flatten(2), out=image_transforms[k].flatten(2)
            )
            kernel = weights[k].permute(2, 3, 1, 0).reshape(self._of_kernel.shape[1], -1)
            torch.mm(self._of_kernel, kernel, out=weight_transforms[k].view(products, -1))
            _transform_back(
                torch.bmm(self._windowed(image_transforms[k]), weight_transforms[k]), self._of_output, outputs[k]
            )
        return outputs.permute(0, 1, 4, 2, 3), (image_transforms, weight_transforms)

    def backward(
        self, gradients: Tensor, saved: tuple[Tensor, Tensor], weights: Tensor, needs_input_gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `ConvMethod`."""
        clients, batch, out_channels, _, out_columns = gradients.shape
        in_channels, height, width = weights.shape[2:]
        products, columns = len(self._of_image), out_columns + width - 1 - 2 * self._padding
        gradient_rows = gradients.permute(0, 1, 3, 4, 2).flatten(3)
        image_gradients = (
            gradients.new_empty(clients, batch, self._of_image.shape[1], columns, in_channels)
            if needs_input_gradients
            else None
        )
        weight_gradients = torch.empty_like(weights)
        transformed = gradients.new_empty(products, batch, out_columns * out_channels)
        for k, (image_transforms, weight_transforms) in enumerate(zip(*saved, strict=True)):
            torch.bmm(self._of_output.expand(batch, -1, -1), gradient_rows[k], out=transformed.transpose(0, 1))
            output_gradients = transformed.view(products, -1, out_channels)
            kernel_gradients = torch.mm(
                self._of_kernel.T, torch.bmm(self._windowed(image_transforms).mT, output_gradients).flatten(1)
            )
            weight_gradients[k] = kernel_gradients.view(height, width, in_channels, out_channels).permute(3, 2, 0, 1)
            if image_gradients is not None:
                window_gradients = torch.bmm(output_gradients, weight_transforms.mT).view(
                    products, batch, out_columns, width, in_channels
                )
                total = gradients.new_zeros(products, batch, columns, in_channels)
                for position in range(width):
                    first = position - self._padding  # the image column at this position of the first window
                    start, stop = max(0, -first), min(out_columns, columns - first)
                    if start < stop:
                        total[:, :, start + first : stop + first] += window_gradients[:, :, start:stop, position]
                _transform_back(total, self._of_image, image_gradients[k])
        return weight_gradients, None if image_gradients is None else image_gradients.permute(0, 1, 4, 2, 3)

    def _windowed(self, transformed: Tensor) -> Tensor:
        """Return the windows along W of images `[B, R, W, C]`, as `[R, B * W', width * C]`."""
        batch, products, columns, channels = transformed.shape
        shape = products, batch, columns - self._width + 1, self._width * channels
        strides = columns * channels, products * columns * channels, channels, 1
        return transformed.as_strided(shape, strides, transformed.storage_offset()).flatten(1, 2)


def _transform_back(products: Tensor, matrix: Tensor, into: Tensor) -> None:
    """Combine `products [R, B * W, C]` with the transposed `matrix [R, H]`, and write the images `[B, H, W, C]`."""
    by_example = products.view(len(products), len(into), -1).transpose(0, 1)
    torch.bmm(matrix.T.expand(len(into), -1, -1), by_example, out=into.flatten(2))
