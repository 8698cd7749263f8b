"""Each convolution method against torch's own convolution and its gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from corymb.simulations.engine.convolution import ClientConv2d, ConvMethod, LibraryConv
from corymb.simulations.engine.frequencies import FourierConv, fourier_is_cheaper, real_products, transforms
from corymb.simulations.engine.layers import StepContext
from corymb.simulations.engine.patches import Geometry, PatchColumns, PatchRows
from corymb.simulations.engine.weight_forms import DenseWeights


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


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


def by_torch(geometry: Geometry, images: Tensor, weights: Tensor, gradients: Tensor | None) -> tuple[Tensor, ...]:
    """Return the outputs and, given their `gradients`, the gradients of weights and images."""
    images, weights = images.clone().requires_grad_(), weights.clone().requires_grad_()
    outputs = torch.stack(
        [
            nn.functional.conv2d(client_images, weight, None, geometry.stride, geometry.padding)
            for client_images, weight in zip(images, weights, strict=True)
        ]
    )
    if gradients is None:
        return (outputs.detach(),)
    return (outputs.detach(), *torch.autograd.grad(outputs, (weights, images), gradients))


def compare(
    method: ConvMethod, geometry: Geometry, images: Tensor, weights: Tensor, needs_input_gradients: bool
) -> None:
    (expected,) = by_torch(geometry, images, weights, None)
    gradients = torch.randn_like(expected)
    for _ in range(2):
        outputs, saved = method.forward(images, weights)
        assert_close(outputs, expected)
        weight_gradients, image_gradients = method.backward(gradients, saved, weights, needs_input_gradients)
        _, expected_for_weights, expected_for_images = by_torch(geometry, images, weights, gradients)
        assert_close(weight_gradients, expected_for_weights)
        assert (image_gradients is not None) == needs_input_gradients
        if image_gradients is not None:
            assert_close(image_gradients, expected_for_images)


@settings(max_examples=60, deadline=None)
@given(cases(with_strides=False), st.booleans())
def test_fourier_conv_equals_torch(case: tuple[Geometry, Tensor, Tensor], needs_input_gradients: bool) -> None:
    geometry, images, weights = case
    method = FourierConv(geometry)
    compare(method, geometry, images, weights, needs_input_gradients)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([PatchColumns, LibraryConv]), st.booleans())
def test_patch_columns_and_library_conv_equal_torch(
    case: tuple[Geometry, Tensor, Tensor], method: Callable[[Geometry], ConvMethod], needs_input_gradients: bool
) -> None:
    compare(method(case[0]), *case, needs_input_gradients)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_patch_rows_equal_torch(case: tuple[Geometry, Tensor, Tensor]) -> None:
    compare(PatchRows(case[0]), *case, needs_input_gradients=False)


def test_a_kernel_of_five_rows_leaves_a_third_of_the_products() -> None:
    """By hand: 14 rows and 2 zeros are 9 frequencies, of which the first and the last are real; 14 x 5 products."""
    of_image, of_kernel, of_output = transforms(14, 5, 2, torch.float64)
    assert len(of_image) == len(of_kernel) == len(of_output) == real_products(16) == 2 + 3 * 7
    assert len(transforms(13, 3, 2, torch.float64)[0]) == real_products(15) == 1 + 3 * 7
    image, kernel = torch.eye(14, dtype=torch.float64)[3], torch.arange(1.0, 6.0).double()
    outputs = of_output.T @ ((of_image @ image) * (of_kernel @ kernel))
    expected = torch.zeros(14, dtype=torch.float64)
    expected[1:6] = torch.tensor(
        [5.0, 4.0, 3.0, 2.0, 1.0]
    )  # the output two rows before the image's one is the last kernel row
    assert_close(outputs, expected)


@pytest.mark.parametrize(
    ("images", "kernel", "padding", "expected"),
    [
        ((5, 10, 32, 14, 14), (64, 32, 5, 5), (2, 2), True),
        ((5, 10, 64, 16, 16), (64, 64, 1, 1), (0, 0), False),  # a kernel of one row saves nothing
        ((5, 10, 16, 32, 32), (32, 16, 3, 3), (1, 1), False),  # few channels: the transforms are most of the work
        ((5, 10, 32, 14, 14), (64, 32, 5, 5), (4, 4), False),  # outputs larger than images
        ((32, 10, 256, 32, 32), (256, 256, 3, 3), (1, 1), False),  # over MAX_SAVED: a gigabyte of transformed weights
        ((1, 10, 256, 32, 32), (256, 256, 3, 3), (1, 1), True),
    ],
)
def test_when_fourier_conv_is_chosen(
    images: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, int], expected: bool
) -> None:
    geometry = Geometry(kernel[2:], (1, 1), padding, (1, 1), 1)
    assert fourier_is_cheaper(torch.Size(images), torch.Size((images[0], *kernel)), geometry) == expected


def test_rounding_errors_of_fourier_conv_are_about_those_of_the_library() -> None:
    """In float32, against float64, with a row that is a thousand times as bright as the others."""
    torch.manual_seed(0)
    geometry = Geometry((5, 5), (1, 1), (2, 2), (1, 1), 1)
    images, weights = torch.randn(1, 4, 32, 14, 14), torch.randn(1, 64, 32, 5, 5)
    (exact,) = by_torch(geometry, images.double(), weights.double(), None)
    errors = []
    for method in (FourierConv(geometry), LibraryConv(geometry)):
        errors.append(float((method.forward(images, weights)[0] - exact).norm() / exact.norm()))
    assert errors[0] < 2 * errors[1] < 2e-6
    images[:, :, :, 0] *= 1000
    (exact,) = by_torch(geometry, images.double(), weights.double(), None)
    outputs = FourierConv(geometry).forward(images, weights)[0]
    assert float((outputs - exact)[..., 6:, :].norm() / exact[..., 6:, :].norm()) < 1e-3  # far from the bright row


@pytest.mark.parametrize(
    ("original", "shape", "method"),
    [
        (nn.Conv2d(32, 64, 5, padding=2), (10, 32, 14, 14), FourierConv),
        (nn.Conv2d(32, 64, 5, padding=2, stride=2), (10, 32, 14, 14), LibraryConv),
        (nn.Conv2d(1, 32, 5), (10, 1, 28, 28), PatchRows),
        (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 6, 6), LibraryConv),
    ],
    ids=str,
)
def test_a_layer_chooses_the_cheapest_method(
    original: nn.Conv2d, shape: tuple[int, ...], method: type[ConvMethod]
) -> None:
    layer = ClientConv2d(original, StepContext(clients=1))
    layer.forms = {"weight": DenseWeights(original.weight.detach(), 1)}
    _, (chosen, *_) = layer.outputs(torch.zeros(shape), needs_input_gradients=method is not PatchRows)
    assert type(chosen) is method
