"""Norm layers with one set of weights, and for batch norm one set of statistics, per client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corymb.simulations.engine.layers import Block, ClientLayer, StepContext
from corymb.simulations.engine.weight_forms import as_dtype, first_rows

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class ClientGroupNorm(ClientLayer):
    """`nn.GroupNorm` for K clients: each example is normalised alone, then scaled by its client's weights."""

    def __init__(self, original: nn.GroupNorm, context: StepContext) -> None:
        super().__init__(original, context)
        self._groups, self._eps = original.num_groups, original.eps

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        """See `ClientLayer.run`."""
        normalised = F.group_norm(inputs, self._groups, eps=self._eps)
        return _scaled(normalised, parameters, (-1, *[1] * (inputs.dim() - 2)))


class ClientLayerNorm(ClientLayer):
    """`nn.LayerNorm` for K clients: each example is normalised alone, then scaled by its client's weights."""

    def __init__(self, original: nn.LayerNorm, context: StepContext) -> None:
        super().__init__(original, context)
        self._shape, self._eps = original.normalized_shape, original.eps

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        """See `ClientLayer.run`."""
        normalised = F.layer_norm(inputs, self._shape, eps=self._eps)
        return _scaled(normalised, parameters, (*[1] * (inputs.dim() - 1 - len(self._shape)), *self._shape))


def _scaled(normalised: Tensor, parameters: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return `normalised [K * B, ...]` with each client's weight and bias, where there are any, as `[K, 1, *shape]`."""
    if not parameters:
        return normalised
    weight = parameters["weight"]
    by_client = normalised.unflatten(0, (len(weight), -1))
    if "bias" not in parameters:
        product: Tensor = by_client * weight.view(len(weight), 1, *shape)
        return product.flatten(0, 1)
    bias = parameters["bias"].view(len(weight), 1, *shape)
    scaled: Tensor = torch.addcmul(bias, by_client, weight.view(len(weight), 1, *shape))
    return scaled.flatten(0, 1)


class ClientBatchNorm(ClientLayer):
    """`nn.BatchNorm1d`, `2d` and `3d` for K clients: each batch is normalised by its client's own statistics.

    torch's own kernel runs client by client, without the padding of a batch, so that every client's statistics and
    running statistics are exactly those of a client that trains alone.
    """

    by_hand = True
    needs_lengths = True

    def __init__(self, original: BatchNorm, context: StepContext) -> None:
        super().__init__(original, context)
        if original.momentum is None:
            raise ValueError("is a BatchNorm with momentum = None")
        self._momentum, self._eps = original.momentum, original.eps
        self._statistics = dict(original.named_buffers())  # at K clients once a block has started

    def start_block(self, start: Mapping[str, Tensor], block: Block) -> None:
        """See `ClientLayer.start_block`."""
        super().start_block(start, block)
        clients = len(block.clients)
        self._statistics = {
            name: start[name].clone() if block.own_starts else start[name].expand(clients, *start[name].shape).clone()
            for name in self._statistics
        }

    def buffers_after(self) -> dict[str, Tensor]:
        """See `ClientLayer.buffers_after`."""
        return self._statistics

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Tensor, Any]:
        """See `ClientLayer.outputs`. Raises `ValueError` for a batch with one number per channel, as torch does."""
        by_client = self.cast(inputs).unflatten(0, (self.context.clients, -1))
        outputs, saved = torch.empty_like(by_client), list[tuple[Tensor, ...]]()
        if any(length < by_client.shape[1] for length in self.context.lengths):
            outputs.zero_()
        for k, (images, length) in enumerate(zip(by_client, self.context.lengths, strict=True)):
            if not length:  # the client has finished
                saved.append(())
                continue
            examples = first_rows(length, images)
            if examples.numel() == examples.shape[1]:
                raise ValueError("a batch has only one number per channel, from which BatchNorm cannot learn")
            weight, bias, mean, variance = self._of(k)
            # Not its variant with `out`, whose numbers are wrong if inputs and outputs differ in memory format.
            result, *moments = torch.native_batch_norm(
                examples, weight, bias, mean, variance, True, self._momentum, self._eps
            )
            first_rows(length, outputs[k]).copy_(result)
            saved.append((examples, *moments))
        if "num_batches_tracked" in self._statistics:
            trained = torch.tensor([length > 0 for length in self.context.lengths])
            first_rows(len(trained), self._statistics["num_batches_tracked"]).add_(trained)
        return outputs.flatten(0, 1), (saved, inputs.dtype)

    def backward(self, gradients: Tensor, saved: Any, needs_input_gradients: bool) -> Tensor | None:
        """See `ClientLayer.backward`."""
        each, dtype = saved
        by_client = gradients.unflatten(0, (self.context.clients, -1))
        input_gradients = torch.zeros_like(by_client) if needs_input_gradients else None
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for k, details in enumerate(each):
            weight, _, mean, variance = self._of(k)
            if not details:
                for name in self.names:
                    found[name].append(torch.zeros_like(weight))
                continue
            examples, *moments = details
            results = torch.ops.aten.native_batch_norm_backward(
                first_rows(len(examples), by_client[k]), examples, weight, mean, variance, *moments, True, self._eps,
                [needs_input_gradients, bool(self.names), bool(self.names)],
            )  # fmt: skip
            if input_gradients is not None:
                first_rows(len(examples), input_gradients[k]).copy_(results[0])
            for name, gradient in zip(self.names, results[1:], strict=False):
                found[name].append(gradient)
        for name, rows in found.items():
            self.dense(name).apply_weight_gradient(torch.stack(rows), self.context.rate)
        return None if input_gradients is None else as_dtype(input_gradients.flatten(0, 1), dtype)

    def _of(self, k: int) -> list[Any]:
        """Return weight, bias and running statistics of client `k`; None for what the layer does not have."""
        parameters = [self.dense(name).weight[k] if name in self.names else None for name in ("weight", "bias")]
        statistics = [self._statistics.get(name) for name in ("running_mean", "running_var")]
        return [*parameters, *(None if each is None else each[k] for each in statistics)]
