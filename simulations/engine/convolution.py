"""A convolution with one set of weights per client, and the choice between the methods to compute it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corymb.simulations.engine.frequencies import FourierConv, fourier_is_cheaper
from corymb.simulations.engine.layers import ClientLayer, StepContext
from corymb.simulations.engine.patches import Geometry, PatchColumns, PatchRows
from corymb.simulations.engine.weight_forms import first_rows


class ConvMethod(Protocol):
    """A method to convolve K clients' images `[K, B, in, H, W]` with their own weights `[K, out, in, h, w]`."""

    def forward(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Any]:
        """Return the outputs `[K, B, out, H', W']` without a bias, and what `backward` needs."""

    def backward(
        self, gradients: Tensor, saved: Any, weights: Tensor, needs_input_gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the weights, and those of the images if needed, from those of the outputs."""


class ClientConv2d(ClientLayer):
    """`nn.Conv2d` with one set of weights per client, computed by one of four methods.

    On a GPU: `PatchColumns`, because a kernel launch per client does too little work there. On a CPU: `PatchRows` if
    the inputs have few channels and the outputs many, and the inputs' gradients are not needed, and `FourierConv` if it
    leaves fewer operations. Otherwise, and always for grouped channels: `LibraryConv`.
    """

    FEW_CHANNELS, MANY_CHANNELS = 4, 32
    by_hand = True

    def __init__(self, original: nn.Conv2d, context: StepContext) -> None:
        super().__init__(original, context)
        if original.padding_mode != "zeros" or isinstance(original.padding, str):
            raise ValueError(
                f"is a Conv2d with padding = {original.padding!r} and padding_mode = {original.padding_mode!r}"
            )
        self._methods: dict[type[Any], ConvMethod] = {}
        self._geometry = Geometry(
            original.kernel_size, original.stride, tuple(map(int, original.padding)), original.dilation, original.groups
        )

    def weights(self, images: Tensor) -> Tensor:
        """Return the weights `[A, out, in, h, w]` of the first A clients, in the dtype of `images [A, ...]`."""
        return self.dense("weight").like(images)

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Tensor, Any]:
        """See `ClientLayer.outputs`."""
        images = self.cast(inputs).unflatten(0, (self.context.clients, -1))
        weights = self.weights(images)
        method = self._method(images, weights, needs_input_gradients)
        outputs, saved = method.forward(images, weights)
        if "bias" in self.forms:
            outputs += first_rows(self.context.clients, self.dense("bias").weight)[:, None, :, None, None]
        return outputs.flatten(0, 1), (method, saved, inputs.dtype)

    def backward(self, gradients: Tensor, saved: Any, needs_input_gradients: bool) -> Tensor | None:
        """See `ClientLayer.backward`."""
        method, saved, dtype = saved
        by_client = gradients.unflatten(0, (self.context.clients, -1))
        weight_gradient, input_gradients = method.backward(
            by_client, saved, self.weights(by_client), needs_input_gradients
        )
        self.dense("weight").apply_weight_gradient(weight_gradient, self.context.rate)
        self.apply_bias_gradients(by_client.sum(dim=(3, 4)))
        return None if input_gradients is None else input_gradients.flatten(0, 1).to(dtype)

    def _method(self, images: Tensor, weights: Tensor, needs_input_gradients: bool) -> ConvMethod:
        kind = self._choose(images, weights, needs_input_gradients)
        if kind not in self._methods:
            self._methods[kind] = kind(self._geometry)
        return self._methods[kind]

    def _choose(self, images: Tensor, weights: Tensor, needs_input_gradients: bool) -> type[Any]:
        geometry = self._geometry
        if geometry.groups > 1:
            return LibraryConv
        if self.context.use_patches:
            return PatchColumns
        has_few = weights.shape[2] <= self.FEW_CHANNELS and weights.shape[1] >= self.MANY_CHANNELS
        if geometry.dilation == (1, 1) and has_few and not needs_input_gradients:
            return PatchRows
        return FourierConv if fourier_is_cheaper(images.shape, weights.shape, geometry) else LibraryConv


def library_work(module: nn.Module, inputs: Tensor) -> int:
    """Return how many multiplications of an example on a CPU are left to torch's own convolutions, client by client.

    `inputs` are examples of one batch. They pass through `module`, whose buffers may change.
    """
    found: list[int] = []

    def add(layer: Any, arguments: Any, outputs: Tensor) -> None:
        geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        is_plain = not isinstance(layer.padding, str) and layer.groups == 1
        if is_plain and fourier_is_cheaper(arguments[0][None].shape, layer.weight[None].shape, geometry):
            return
        found.append(outputs[0, 0].numel() * layer.weight.numel())

    hooks = [each.register_forward_hook(add) for each in module.modules() if isinstance(each, nn.Conv2d)]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found)


class LibraryConv:
    """torch's own convolution, client by client."""

    def __init__(self, geometry: Geometry) -> None:
        self._options: Any = geometry.stride, geometry.padding, geometry.dilation
        self._groups = geometry.groups

    def forward(self, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See `ConvMethod`."""
        contiguous = images.contiguous()
        pairs: Any = zip(contiguous, weights, strict=True)
        conv2d: Any = nn.functional.conv2d
        outputs = [conv2d(each, weight, None, *self._options, self._groups) for each, weight in pairs]
        return torch.stack(outputs), contiguous

    def backward(
        self, gradients: Tensor, saved: Tensor, weights: Tensor, needs_input_gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `ConvMethod`."""
        wanted = [needs_input_gradients, True, False]
        image_gradients, weight_gradients, _ = zip(
            *(
                torch.ops.aten.convolution_backward(*each, None, *self._options, False, [0, 0], self._groups, wanted)
                for each in zip(gradients.contiguous(), saved, weights, strict=True)
            ),
            strict=True,
        )
        return torch.stack(weight_gradients), torch.stack(image_gradients) if needs_input_gradients else None
