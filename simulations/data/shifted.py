"""Digits whose pixels differ by site: one class distribution everywhere, but other features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.formats import Options, digits, split

SITES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda pixels: pixels,
    "inverted": lambda pixels: 1 - pixels,
    "dark": lambda pixels: 0.2 * pixels,
    "bright": lambda pixels: 0.6 + 0.4 * pixels,
    "strong": lambda pixels: 3 * pixels - 1,
    "squared": lambda pixels: pixels.square() - 0.5,
}


def shifted_digits() -> Source:
    """Return scikit-learn's digits, dealt out to six sites that each see their pixels in another way."""
    examples = digits()
    names = tuple(SITES)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    sites = [""] * len(examples)
    inputs = examples.inputs.clone()
    for place, row in enumerate(order):
        sites[row] = names[place % len(names)]
        inputs[row] = SITES[sites[row]](inputs[row])
    return split(replace(Examples(inputs, examples.targets), sites=tuple(sites)), Options())
