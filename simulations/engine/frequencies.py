"""Convolutions with fewer multiplications: along the rows of an image they are products of frequencies.

A convolution of n rows with a kernel of k rows takes about n * k products; the discrete Fourier transform makes one
product of complex numbers of each frequency (Cooley and Tukey 1965), and Gauss's way three real ones of that. So about
1.5 (n + padding) products are left, a third of them for a 5 by 5 kernel. Transforms are products with small matrices
as well. Rounding errors are about a convolution's own, but relative to the largest number in a column of an image, not
in a window. Columns stay as they are: they make windows.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from corymb.simulations.engine.patches import Geometry
from corymb.simulations.engine.scratch import Scratch

TRANSFORM = 4  # what an operation of a transform costs, in operations of a product
WORTHWHILE = 0.75  # of the operations that the convolution itself takes
LARGEST = 1 << 26  # numbers of weights and images that are kept from the way forward to the way back


def products(period: int) -> int:
    """How many are left of so many rows, zeros included: three of each frequency, one of each that is real."""
    return 3 * (period // 2) + (1 if period % 2 else -1)


@lru_cache(maxsize=64)
def transforms(rows: int, kernel: int, padding: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices S `[R, rows]`, V `[R, kernel]` and T `[R, out]` such that `T' (S x * V w)` is x convolved with w."""
    period = rows + padding  # the zeros of one end serve the other as well
    of_rows = torch.arange(rows, dtype=torch.float64)
    of_kernel = torch.arange(kernel, dtype=torch.float64) - padding
    of_outputs = torch.arange(rows + 2 * padding - kernel + 1, dtype=torch.float64)
    spread, weigh, gather = [], [], []
    for frequency in range(period // 2 + 1):
        turn = 2 * math.pi * frequency / period
        a, b = torch.cos(turn * of_rows), -torch.sin(turn * of_rows)
        c, d = torch.cos(turn * of_kernel), torch.sin(turn * of_kernel)
        cos, sin = torch.cos(turn * of_outputs), torch.sin(turn * of_outputs)
        if frequency == 0 or 2 * frequency == period:  # real
            spread.append(a)
            weigh.append(c)
            gather.append(cos / period)
        else:  # (a + bi)(c + di) = (c(a + b) - b(c + d)) + (c(a + b) + a(d - c))i
            spread += [a + b, a, b]
            weigh += [c, d - c, c + d]
            gather += [2 / period * (cos - sin), -2 / period * sin, -2 / period * cos]
    return torch.stack(spread).to(dtype), torch.stack(weigh).to(dtype), torch.stack(gather).to(dtype)


def are_worthwhile(images: torch.Size, weights: torch.Size, geometry: Geometry) -> bool:
    """Whether less work is left for `images [K, B, in, H, W]` and `weights [K, out, in, h, w]`, by operation count.

    Strides and dilation have to be one, and the outputs no larger than the images.
    """
    if geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return False
    padding, (clients, batch, inner, rows, columns) = geometry.padding, images
    outer, height, width = weights[1], *weights[3:]
    if any(2 * pad > size - 1 for pad, size in zip(padding, (height, width), strict=True)):
        return False
    out_rows, out_columns = rows + 2 * padding[0] - height + 1, columns + 2 * padding[1] - width + 1
    many = products(rows + padding[0])
    if clients * many * inner * (width * outer + batch * columns) > LARGEST:
        return False
    direct = 3 * out_rows * out_columns * height * width * inner * outer
    left = 3 * many * out_columns * width * inner * outer
    left += TRANSFORM * 2 * many * (rows * columns * inner + out_rows * out_columns * outer)
    left += TRANSFORM * 3 * many * height * width * inner * outer // max(1, batch)
    return left < WORTHWHILE * direct


class Frequencies:
    """Convolutions with strides of one, client by client."""

    def __init__(self, geometry: Geometry) -> None:
        (self._height, self._width), (self._above, self._padding) = geometry.kernel, geometry.padding
        self._images, self._weights, self._windows, self._slopes, self._found = (Scratch() for _ in range(5))

    def outputs(self, images: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `convolution.Way`; kept are the spread images `[K, B, R, W, in]` and weights `[K, R, w * in, out]`."""
        clients, batch, inner, height, columns = images.shape
        self._spread, self._weigh, self._gather = transforms(height, self._height, self._above, images.dtype)
        outer, count = weights.shape[1], columns + 2 * self._padding - self._width + 1
        many = len(self._spread)
        found = self._found.of((clients, batch, self._gather.shape[1], count, outer), images)
        weighed = self._weights.of((clients, many, self._width * inner, outer), images)
        padded = nn.functional.pad(images.permute(0, 1, 3, 4, 2), (0, 0, self._padding, self._padding))
        spread = self._images.of((clients, batch, many, *padded.shape[3:]), images)
        for k, mine in enumerate(padded):
            torch.bmm(self._spread.expand(batch, -1, -1), mine.flatten(2), out=spread[k].flatten(2))
            of_kernel = weights[k].permute(2, 3, 1, 0).reshape(self._weigh.shape[1], -1)
            torch.mm(self._weigh, of_kernel, out=weighed[k].view(many, -1))
            _gathered(torch.bmm(self._windowed(spread[k]), weighed[k]), self._gather, found[k])
        return found.permute(0, 1, 4, 2, 3), (spread, weighed)

    def back(
        self, slopes: Tensor, kept: tuple[Tensor, Tensor], weights: Tensor, inward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `convolution.Way`."""
        clients, batch, outer, _, count = slopes.shape
        inner, height, width = weights.shape[2:]
        many, columns = len(self._spread), count + width - 1 - 2 * self._padding
        rows = slopes.permute(0, 1, 3, 4, 2).flatten(3)
        found = slopes.new_empty(clients, batch, self._spread.shape[1], columns, inner) if inward else None
        gradients = torch.empty_like(weights)
        spread = self._slopes.of((many, batch, count * outer), slopes)
        for k, (images, weighed) in enumerate(zip(*kept, strict=True)):
            torch.bmm(self._gather.expand(batch, -1, -1), rows[k], out=spread.transpose(0, 1))
            mine = spread.view(many, -1, outer)
            moved = torch.mm(self._weigh.T, torch.bmm(self._windowed(images).mT, mine).flatten(1))
            gradients[k] = moved.view(height, width, inner, outer).permute(3, 2, 0, 1)
            if found is not None:
                each = torch.bmm(mine, weighed.mT).view(many, batch, count, width, inner)
                total = slopes.new_zeros(many, batch, columns, inner)
                for place in range(width):
                    first = place - self._padding  # the column of an image that the first window has in this place
                    start, stop = max(0, -first), min(count, columns - first)
                    if start < stop:
                        total[:, :, start + first : stop + first] += each[:, :, start:stop, place]
                _gathered(total, self._spread, found[k])
        return gradients, None if found is None else found.permute(0, 1, 4, 2, 3)

    def _windowed(self, spread: Tensor) -> Tensor:
        """Images `[B, R, W, C]` as their windows along W, `[R, B * W', width * C]`."""
        batch, many, columns, channels = spread.shape
        shape = many, batch, columns - self._width + 1, self._width * channels
        windows = self._windows.of(shape, spread)
        strides = columns * channels, many * columns * channels, channels, 1
        return windows.copy_(spread.as_strided(shape, strides, spread.storage_offset())).flatten(1, 2)


def _gathered(products: Tensor, matrix: Tensor, into: Tensor) -> None:
    """Gather `products [R, B * W, C]` with `matrix [R, H]` into images, `[B, H, W, C]`."""
    spread = products.view(len(products), len(into), -1).transpose(0, 1)
    torch.bmm(matrix.T.expand(len(into), -1, -1), spread, out=into.flatten(2))
