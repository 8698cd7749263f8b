"""Compression of updates: what a client sends in place of its model, and how the server restores it.

An update is the client's parameters minus those that it received, as one vector `[P]`. Each kind turns it into a few
small tensors and back. The server trusts none of them: `restore` checks their shapes and allocates `[P]` at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from corymb.protocol.settings import Settings

UPDATE = "update"  # ArrayRecord in a reply: the tensors of a compressed update
COMPRESSION = "compression"  # ConfigRecord in a reply: the settings that the update was compressed with
CHUNK = 1024  # numbers that share a scale
Kind = Literal["top_k", "drop", "quantize", "sign", "fp8"]


class BadUpdate(ValueError):
    """The tensors of a compressed update do not fit the model."""


class CompressionSettings(Settings):
    """How clients compress their updates."""

    kind: Kind
    """"top_k" sends the largest numbers, "drop" random ones, rescaled (DARE, Yu et al. 2024), "quantize" all with few
    bits and stochastic rounding (QSGD, Alistarh et al. 2017), "sign" one bit each with a scale (Bernstein et al.
    2018), "fp8" eight-bit floats."""
    share: float = Field(0.1, gt=0, le=1)
    """The share of the numbers that "top_k" and "drop" send."""
    bits: Literal[4, 8] = 8
    """The bits of a number under "quantize"."""
    error_feedback: bool | None = None
    """Add what was left out to the next update (Seide et al. 2014). Default: for "top_k" and "sign", which are
    biased."""

    @property
    def feeds_back(self) -> bool:
        """Whether a client adds what was left out to its next update."""
        return self.kind in ("top_k", "sign") if self.error_feedback is None else self.error_feedback

    def compress(self, update: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the tensors that stand for `update [P]` float32."""
        return _COMPRESS[self.kind](self, update, generator)

    def restore(self, tensors: Mapping[str, Tensor], size: int) -> Tensor:
        """Return the update `[size]` float32 that `tensors` stand for. Raises `BadUpdate` if they are not valid."""
        return _RESTORE[self.kind](self, tensors, size)


def _kept(settings: CompressionSettings, size: int) -> int:
    return max(1, round(settings.share * size)) if size else 0


def _top_k(settings: CompressionSettings, update: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    places = update.abs().topk(_kept(settings, update.numel()), sorted=False).indices.sort().values
    return {"values": update[places], "places": places.int()}


def _from_top_k(settings: CompressionSettings, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    values, places = _of(tensors, "values", torch.float32, None), _of(tensors, "places", torch.int32, None).long()
    if len(values) != len(places) or len(places) > size:
        raise BadUpdate(f"it has {len(values)} values at {len(places)} places of {size}")
    if len(places) and not (int(places[0]) >= 0 and int(places[-1]) < size and bool((places.diff() > 0).all())):
        raise BadUpdate("its places do not rise within the model")
    return torch.zeros(size).index_copy_(0, places, values)


def _drop(settings: CompressionSettings, update: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    seed = torch.randint(1 << 62, (1,), generator=generator)
    return {"values": update[_mask(settings, update.numel(), seed)] / settings.share, "seed": seed}


def _from_dropped(settings: CompressionSettings, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    mask = _mask(settings, size, _of(tensors, "seed", torch.int64, 1))
    values = _of(tensors, "values", torch.float32, int(mask.sum()))
    restored: Tensor = torch.zeros(size).masked_scatter_(mask, values)
    return restored


def _mask(settings: CompressionSettings, size: int, seed: Tensor) -> Tensor:
    """Return which numbers are kept, each with the probability `share`; the server draws the same ones."""
    generator = torch.Generator().manual_seed(int(seed))
    mask: Tensor = torch.rand(size, generator=generator) < settings.share
    return mask


def _quantize(settings: CompressionSettings, update: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    levels = 2 ** (settings.bits - 1) - 1
    chunks = _chunks(update)
    scales = chunks.abs().amax(dim=1) / levels
    exact = chunks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    rounded = (exact + torch.rand(chunks.shape, generator=generator)).floor().clamp(-levels, levels)  # unbiased
    codes = (rounded.flatten()[: update.numel()] + levels).to(torch.uint8)
    return {"codes": codes if settings.bits == 8 else _packed(codes, 4), "scales": scales}


def _from_quantized(settings: CompressionSettings, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    levels, width = 2 ** (settings.bits - 1) - 1, 8 // settings.bits
    scales = _of(tensors, "scales", torch.float32, ceil(size / CHUNK))
    codes = _of(tensors, "codes", torch.uint8, ceil(size / width))
    numbers: Tensor = (codes if settings.bits == 8 else _unpacked(codes, 4, size)).float() - levels
    return numbers * scales.repeat_interleave(CHUNK)[:size]


def _sign(settings: CompressionSettings, update: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    padding = torch.arange(ceil(update.numel() / CHUNK) * CHUNK).view(-1, CHUNK) >= update.numel()
    counts = (~padding).sum(dim=1)
    scales = _chunks(update).abs().sum(dim=1) / counts
    return {"signs": _packed((update >= 0).to(torch.uint8), 1), "scales": scales}


def _from_signs(settings: CompressionSettings, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    scales = _of(tensors, "scales", torch.float32, ceil(size / CHUNK))
    signs = _unpacked(_of(tensors, "signs", torch.uint8, ceil(size / 8)), 1, size).float() * 2 - 1
    return signs * scales.repeat_interleave(CHUNK)[:size]


def _fp8(settings: CompressionSettings, update: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    chunks = _chunks(update)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = chunks.abs().amax(dim=1) / largest
    scaled = chunks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8).flatten()[: update.numel()]
    return {"codes": codes.clone(), "scales": scales}


def _from_fp8(settings: CompressionSettings, tensors: Mapping[str, Tensor], size: int) -> Tensor:
    scales = _of(tensors, "scales", torch.float32, ceil(size / CHUNK))
    codes = _of(tensors, "codes", torch.uint8, size)
    numbers: Tensor = codes.view(torch.float8_e4m3fn).float()
    return numbers * scales.repeat_interleave(CHUNK)[:size]


def _chunks(update: Tensor) -> Tensor:
    """Return `update` as `[n, CHUNK]`, padded with zeros."""
    return torch.nn.functional.pad(update, (0, -update.numel() % CHUNK)).view(-1, CHUNK)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Return numbers of so many `bits` packed into bytes, the first in the lowest bits."""
    width = 8 // bits
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % width)).view(-1, width)
    return (rows << torch.arange(0, 8, bits)).sum(dim=1).to(torch.uint8)


def _unpacked(codes: Tensor, bits: int, size: int) -> Tensor:
    numbers: Tensor = (codes[:, None].int() >> torch.arange(0, 8, bits)) & (2**bits - 1)
    return numbers.flatten()[:size]


def _of(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, size: int | None) -> Tensor:
    """Return a vector by name. Raises `BadUpdate` if it is missing or has another dtype or size."""
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.dim() != 1 or (size is not None and len(tensor) != size):
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise BadUpdate(f"its tensor {name!r} is {found}, not {dtype} [{'n' if size is None else size}]")
    return tensor


_COMPRESS: dict[str, Callable[[CompressionSettings, Tensor, torch.Generator], dict[str, Tensor]]] = {
    "top_k": _top_k, "drop": _drop, "quantize": _quantize, "sign": _sign, "fp8": _fp8,
}  # fmt: skip
_RESTORE: dict[str, Callable[[CompressionSettings, Mapping[str, Tensor], int], Tensor]] = {
    "top_k": _from_top_k, "drop": _from_dropped, "quantize": _from_quantized, "sign": _from_signs, "fp8": _from_fp8,
}  # fmt: skip


def settings_in(record: Mapping[str, Any]) -> CompressionSettings:
    """Return the settings in a reply's record. Raises `BadUpdate` if they are not valid."""
    try:
        return CompressionSettings(**record)
    except (ValueError, TypeError):
        raise BadUpdate("its compression settings are not valid") from None
