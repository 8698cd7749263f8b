"""Each way to convolve against torch's own convolution and its gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corymb.simulations.engine.convolution import ClientConv2d, Library, Way
from corymb.simulations.engine.frequencies import Frequencies, are_worthwhile, products, transforms
from corymb.simulations.engine.layers import StepContext
from corymb.simulations.engine.patches import Geometry, Patches, Rows
from corymb.simulations.engine.weight_forms import DenseWeights


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@st.composite
def cases(draw: st.DrawFn, with_strides: bool = True) -> tuple[Geometry, Tensor, Tensor]:
    """A geometry, images `[K, B, in, H, W]` and weights `[K, out, in, h, w]`."""
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    padding = tuple(draw(st.integers(0, (size - 1) // 2)) for size in kernel)
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) if with_strides else (1, 1)
    clients, batch, inner, outer = (draw(st.integers(1, 3)) for _ in range(4))
    height, width = (
        max(1, size - 2 * pad) + draw(st.integers(0, 6)) for size, pad in zip(kernel, padding, strict=True)
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    images = torch.randn(clients, batch, inner, height, width, dtype=torch.float64)
    weights = torch.randn(clients, outer, inner, *kernel, dtype=torch.float64)
    return Geometry(kernel, stride, padding, (1, 1), 1), images, weights


def by_torch(geometry: Geometry, images: Tensor, weights: Tensor, slopes: Tensor | None) -> tuple[Tensor, ...]:
    """Outputs, and for `slopes` of them the gradients of weights and images."""
    images, weights = images.clone().requires_grad_(), weights.clone().requires_grad_()
    outputs = torch.stack(
        [
            nn.functional.conv2d(mine, weight, None, geometry.stride, geometry.padding)
            for mine, weight in zip(images, weights, strict=True)
        ]
    )
    if slopes is None:
        return (outputs.detach(),)
    return (outputs.detach(), *torch.autograd.grad(outputs, (weights, images), slopes))


def compare(way: Way, geometry: Geometry, images: Tensor, weights: Tensor, inward: bool) -> None:
    (expected,) = by_torch(geometry, images, weights, None)
    slopes = torch.randn_like(expected)
    for _ in range(2):  # the second time in memory that was used before
        outputs, kept = way.outputs(images, weights)
        assert_close(outputs, expected)
        gradient, inner = way.back(slopes, kept, weights, inward)
        _, of_weights, of_images = by_torch(geometry, images, weights, slopes)
        assert_close(gradient, of_weights)
        assert (inner is not None) == inward
        if inner is not None:
            assert_close(inner, of_images)


@settings(max_examples=60, deadline=None)
@given(cases(with_strides=False), st.booleans())
def test_through_frequencies(case: tuple[Geometry, Tensor, Tensor], inward: bool) -> None:
    geometry, images, weights = case
    way = Frequencies(geometry)
    compare(way, geometry, images, weights, inward)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([Patches, Library]), st.booleans())
def test_with_patches_and_the_library(
    case: tuple[Geometry, Tensor, Tensor], way: Callable[[Geometry], Way], inward: bool
) -> None:
    compare(way(case[0]), *case, inward)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_with_rows(case: tuple[Geometry, Tensor, Tensor]) -> None:
    compare(Rows(case[0]), *case, inward=False)


def test_a_kernel_of_five_leaves_a_third_of_the_products() -> None:
    """By hand: 14 rows and 2 zeros are 9 frequencies, of which the first and the last are real; 14 x 5 products."""
    spread, weigh, gather = transforms(14, 5, 2, torch.float64)
    assert len(spread) == len(weigh) == len(gather) == products(16) == 2 + 3 * 7
    assert len(transforms(13, 3, 2, torch.float64)[0]) == products(15) == 1 + 3 * 7
    found = gather.T @ ((spread @ torch.eye(14, dtype=torch.float64)[3]) * (weigh @ torch.arange(1.0, 6.0).double()))
    expected = torch.zeros(14, dtype=torch.float64)
    expected[1:6] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # what lies two rows before sees the kernel's end
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("images", "kernel", "padding", "expected"),
    [
        ((5, 10, 32, 14, 14), (64, 32, 5, 5), (2, 2), True),
        ((5, 10, 64, 16, 16), (64, 64, 1, 1), (0, 0), False),  # nothing to save
        ((5, 10, 16, 32, 32), (32, 16, 3, 3), (1, 1), False),  # few channels: the transforms are most of the work
        ((5, 10, 32, 14, 14), (64, 32, 5, 5), (4, 4), False),  # outputs larger than images
        ((32, 10, 256, 32, 32), (256, 256, 3, 3), (1, 1), False),  # a gigabyte of weights
        ((1, 10, 256, 32, 32), (256, 256, 3, 3), (1, 1), True),
    ],
)
def test_where_frequencies_are_worthwhile(
    images: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, int], expected: bool
) -> None:
    geometry = Geometry(kernel[2:], (1, 1), padding, (1, 1), 1)
    assert are_worthwhile(torch.Size(images), torch.Size((images[0], *kernel)), geometry) == expected


def test_rounding_is_about_that_of_the_library() -> None:
    """In float32, against float64, with a row that is a thousand times as bright as the others."""
    torch.manual_seed(0)
    geometry = Geometry((5, 5), (1, 1), (2, 2), (1, 1), 1)
    images, weights = torch.randn(1, 4, 32, 14, 14), torch.randn(1, 64, 32, 5, 5)
    (exact,) = by_torch(geometry, images.double(), weights.double(), None)
    errors = []
    for way in (Frequencies(geometry), Library(geometry)):
        errors.append(float((way.outputs(images, weights)[0] - exact).norm() / exact.norm()))
    assert errors[0] < 2 * errors[1] < 2e-6
    images[:, :, :, 0] *= 1000
    (exact,) = by_torch(geometry, images.double(), weights.double(), None)
    found = Frequencies(geometry).outputs(images, weights)[0]
    assert float((found - exact)[..., 6:, :].norm() / exact[..., 6:, :].norm()) < 1e-3  # far from it


@pytest.mark.parametrize(
    ("original", "shape", "way"),
    [
        (nn.Conv2d(32, 64, 5, padding=2), (10, 32, 14, 14), Frequencies),
        (nn.Conv2d(32, 64, 5, padding=2, stride=2), (10, 32, 14, 14), Library),
        (nn.Conv2d(1, 32, 5), (10, 1, 28, 28), Rows),
        (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 6, 6), Library),
    ],
    ids=str,
)
def test_a_layer_takes_the_way_that_suits_it(original: nn.Conv2d, shape: tuple[int, ...], way: type[Way]) -> None:
    layer = ClientConv2d(original, StepContext(clients=1))
    layer.begin(DenseWeights(original.weight.detach().flatten(1), 1), None)
    _, (found, *_) = layer.outputs(torch.zeros(shape), inward=way is not Rows)
    assert type(found) is way
