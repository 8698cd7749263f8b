"""Attention for several clients at once, with torch's kernel for CPUs, which `torch.func.vmap` would run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_original = nn.functional.scaled_dot_product_attention


@contextmanager
def attention_of_clients() -> Iterator[None]:
    """Let `nn.functional.scaled_dot_product_attention` call the kernel once for all clients of a `vmap`.

    What the kernel does not know, such as dropout or a mask for each example, takes torch's own products and softmax.
    """
    with sdpa_kernel(SDPBackend.MATH):
        nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
        try:
            yield
        finally:
            nn.functional.scaled_dot_product_attention = _original


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    has_mask_for_all = attn_mask is None or attn_mask.shape[:-2].numel() == 1
    fits = (
        query.dim() == 4 and query.shape[:2] == key.shape[:2] and key.shape == value.shape and query.is_floating_point()
    )
    if dropout_p or any(others.values()) or not (has_mask_for_all and fits):
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    attended: Tensor = _Attend.apply(query, key, value, attn_mask, is_causal, scale)[0]  # type: ignore[no-untyped-call]
    return attended


class _Attend(torch.autograd.Function):
    """The kernel: `query`, `key` and `value` are `[B, heads, T, size]`. Returns the outputs and their logarithms."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Any:
        return _FORWARD(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, ctx.mask, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = _AttendBackward.apply(gradients[0], *ctx.saved_tensors, ctx.mask, ctx.is_causal, ctx.scale)  # type: ignore[no-untyped-call]
        return *found, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _for_all_clients(_Attend, info.batch_size, in_dims, inputs)


class _AttendBackward(torch.autograd.Function):
    """The gradients of the query, the key and the value."""

    @staticmethod
    def forward(
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logarithms: Tensor,
        mask: Tensor | None, is_causal: bool, scale: float | None,
    ) -> Any:  # fmt: skip
        return _BACKWARD(gradient, query, key, value, output, logarithms, 0.0, is_causal, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _for_all_clients(_AttendBackward, info.batch_size, in_dims, inputs)


def _for_all_clients(function: Any, clients: int, in_dims: Any, inputs: Any) -> Any:
    """Call `function` with the examples of all clients as one batch."""
    *tensors, mask, is_causal, scale = inputs
    batches = [
        (tensor.expand(clients, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]
    outputs = function.apply(*(b if b.stride(-1) == 1 else b.contiguous() for b in batches), mask, is_causal, scale)
    return tuple(output.unflatten(0, (clients, -1)) for output in outputs), (0,) * len(outputs)
