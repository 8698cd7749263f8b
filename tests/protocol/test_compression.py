"""Compression of updates: exact sizes, unbiased where it should be, and safe against any tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corymb.protocol.compression import BadUpdate, CompressionSettings

KINDS = [
    CompressionSettings(kind="top_k", share=0.1), CompressionSettings(kind="drop", share=0.1),
    CompressionSettings(kind="quantize", bits=8), CompressionSettings(kind="quantize", bits=4),
    CompressionSettings(kind="sign"), CompressionSettings(kind="fp8"),
]  # fmt: skip
SIZES = {"top_k": 8 / 10, "drop": 4 / 10, "quantize8": 1, "quantize4": 1 / 2, "sign": 1 / 8, "fp8": 1}  # bytes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def there_and_back(codec: CompressionSettings, update: Tensor, seed: int = 0) -> Tensor:
    return codec.restore(codec.compress(update, generator(seed)), update.numel())


@pytest.mark.parametrize("codec", KINDS, ids=lambda codec: f"{codec.kind}{codec.bits}")
@given(size=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_size_comes_back_finite(codec: CompressionSettings, size: int, seed: int) -> None:
    update = torch.randn(size, generator=generator(seed))
    assert there_and_back(codec, update, seed).shape == update.shape
    assert there_and_back(codec, torch.zeros(size)).abs().max() == 0


@pytest.mark.parametrize("codec", KINDS, ids=lambda codec: f"{codec.kind}{codec.bits}")
def test_the_number_of_bytes(codec: CompressionSettings) -> None:
    tensors = codec.compress(torch.randn(100_000, generator=generator()), generator())
    name = codec.kind + (str(codec.bits) if codec.kind == "quantize" else "")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size == pytest.approx(100_000 * SIZES[name], rel=0.04)


@pytest.mark.parametrize(
    "codec", [k for k in KINDS if k.kind in ("drop", "quantize")], ids=lambda c: f"{c.kind}{c.bits}"
)
def test_the_mean_of_many_is_the_update(codec: CompressionSettings) -> None:
    update = torch.randn(500, generator=generator(1))
    many = torch.stack([there_and_back(codec, update, seed) for seed in range(2000)])
    error = (many.mean(dim=0) - update) / (many.std(dim=0) / 2000**0.5).clamp(min=1e-6)
    assert error.abs().mean() < 1.0  # standard errors: 0.8 for an unbiased estimate
    assert error.abs().max() < 5.5


def test_top_k_keeps_the_largest() -> None:
    update = torch.tensor([0.1, -5.0, 0.2, 3.0])
    restored = there_and_back(CompressionSettings(kind="top_k", share=0.5), update)
    assert restored.tolist() == [0.0, -5.0, 0.0, 3.0]


def test_sign_has_the_mean_magnitude() -> None:
    update = torch.tensor([1.0, -3.0, 2.0])
    assert there_and_back(CompressionSettings(kind="sign"), update).tolist() == [2.0, -2.0, 2.0]


def test_fp8_has_three_bits_of_mantissa() -> None:
    update = torch.linspace(0.5, 400, 777)
    restored = there_and_back(CompressionSettings(kind="fp8"), update)
    assert ((restored - update).abs() / update).max() <= 1 / 16 + 1e-6


def test_eight_bits_are_exact_to_a_level() -> None:
    update = torch.randn(5000, generator=generator(3))
    restored = there_and_back(CompressionSettings(kind="quantize", bits=8), update)
    assert (restored - update).abs().max() <= update.abs().max() / 127 * 1.001


HOSTILE = {
    "nothing": {},
    "another dtype": {"values": torch.zeros(5, dtype=torch.float64), "places": torch.zeros(5, dtype=torch.int32)},
    "places beyond": {"values": torch.ones(2), "places": torch.tensor([0, 99], dtype=torch.int32)},
    "negative places": {"values": torch.ones(2), "places": torch.tensor([-1, 3], dtype=torch.int32)},
    "a place twice": {"values": torch.ones(2), "places": torch.tensor([3, 3], dtype=torch.int32)},
    "more than the model": {"values": torch.ones(99), "places": torch.arange(99, dtype=torch.int32)},
    "a matrix": {"values": torch.ones(2, 2), "places": torch.zeros(4, dtype=torch.int32)},
    "codes of another size": {"codes": torch.zeros(3, dtype=torch.uint8), "scales": torch.ones(1)},
    "no scales": {"codes": torch.zeros(10, dtype=torch.uint8), "signs": torch.zeros(2, dtype=torch.uint8)},
}


@pytest.mark.parametrize("codec", KINDS, ids=lambda codec: f"{codec.kind}{codec.bits}")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_refused(codec: CompressionSettings, name: str) -> None:
    with pytest.raises(BadUpdate):
        codec.restore(HOSTILE[name], 10)
