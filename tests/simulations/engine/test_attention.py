from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from corymb.simulations.engine import attention
from corymb.simulations.engine.attention import attention_of_clients

CLIENTS, BATCH, HEADS, TIMES, SIZE = 3, 2, 4, 5, 6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def scaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)


def float_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.linspace(-2, 1, TIMES * TIMES, dtype=query.dtype).view(1, 1, TIMES, TIMES)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def bool_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, torch.ones(TIMES, TIMES).tril().bool())


def mask_by_example(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones(BATCH, 1, TIMES, TIMES).tril().bool()
    return nn.functional.scaled_dot_product_attention(query, key, value, mask)


def without_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query[:, 0], key[:, 0], value[:, 0])


def in_other_memory(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (each.mT.contiguous().mT for each in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value)


def other_lengths(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query[:, :, :2], key, value)


ALL = [causal, scaled, float_mask, bool_mask, mask_by_example, without_heads, in_other_memory, other_lengths]
FUSED = [causal, scaled, float_mask, bool_mask, in_other_memory, other_lengths]


@pytest.mark.parametrize("attend", ALL)
def test_attention_of_clients_is_that_of_each_client(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = CLIENTS, BATCH, HEADS, TIMES, SIZE
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))

    def loss(weights: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query * weights, key * weights.flip(0), value + weights).square().sum()

    weights = torch.randn(CLIENTS, SIZE, generator=generator, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        alone = torch.stack([grad(loss)(*each) for each in zip(weights, query, key, value, strict=True)])
    calls = []

    def counted(gradient: Tensor, *others: object, **options: object) -> object:
        calls.append(len(gradient))
        return BACKWARD(gradient, *others, **options)

    monkeypatch.setattr(attention, "_BACKWARD", counted)
    with attention_of_clients():
        together = vmap(grad(loss))(weights, query, key, value)
        shared_key = vmap(grad(loss), in_dims=(0, 0, None, 0))(weights, query, key[0], value)
    assert torch.allclose(together, alone, rtol=1e-10, atol=1e-12)
    assert shared_key.isfinite().all()
    assert calls == ([CLIENTS * BATCH] * 2 if attend in FUSED else []), "the kernel runs once for all clients"


BACKWARD = attention._BACKWARD


def test_torchs_own_function_is_back_afterwards() -> None:
    original = nn.functional.scaled_dot_product_attention
    with pytest.raises(RuntimeError), attention_of_clients():
        raise RuntimeError
    assert nn.functional.scaled_dot_product_attention is original
