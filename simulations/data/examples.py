"""Examples as tensors, and a data set as its training and test examples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Inputs, class labels and, optionally, the sites that the examples come from.

    `inputs [n, ...]` are float32, or uint8 pixels, which `inputs_at` converts to `(input / 255 - mean) / deviation`
    with `scaled = (mean, deviation)`. `targets [n]` are int64 class labels from 0. Sites are given either by
    `sites [n]`, the site's name for each example, or by `offsets [N + 1]`, where the examples of each of N sites are
    contiguous. Raises `ValueError` if lengths, offsets or labels are invalid.
    """

    inputs: Tensor
    targets: Tensor
    sites: tuple[str, ...] | None = None
    offsets: NDArray[np.int64] | None = None
    scaled: tuple[float, float] = (0.0, 1.0)
    is_mapped: bool = False  # the inputs are a memory-mapped file, read on access

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"there are {len(self.inputs)} inputs for {len(self.targets)} labels; give one label per input"
            )
        if self.offsets is not None and not _are_valid_offsets(self.offsets, len(self)):
            raise ValueError(
                f"the offsets must rise from 0 to {len(self)}, the number of examples; give N + 1 for N sites"
            )
        if len(self.targets) and self.targets.min() < 0:
            raise ValueError(f"the label {int(self.targets.min())} is negative; number the classes from 0")

    def __len__(self) -> int:
        return len(self.targets)

    def inputs_at(self, places: slice | Tensor) -> Tensor:
        """Return the inputs at the indices `places`, as float32 inputs of a model."""
        if isinstance(places, slice):
            inputs = self.inputs[places]
        else:  # index_select is several times as fast as indexing with a tensor
            inputs = self.inputs.index_select(0, places.flatten()).unflatten(0, places.shape)
        if inputs.dtype != torch.uint8:
            return inputs
        mean, deviation = self.scaled
        return inputs.float().div_(255).sub_(mean).div_(deviation)

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`. Mapped examples stay where they are, as they may exceed its memory."""
        if self.is_mapped or self.inputs.device == device:
            return self
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def normalised(self, mean: float, deviation: float) -> Examples:
        """Return the examples with `(input - mean) / deviation` as inputs of a model."""
        if self.inputs.dtype == torch.uint8:
            return replace(self, scaled=(mean, deviation))
        return replace(self, inputs=(self.inputs - mean) / deviation)

    def rows(self, rows: Tensor) -> Examples:
        """Return the examples at the indices `rows [m]`."""
        sites = None if self.sites is None else tuple(self.sites[row] for row in rows.tolist())
        return replace(
            self, inputs=self.inputs[rows], targets=self.targets[rows], sites=sites, offsets=None, is_mapped=False
        )


@dataclass(frozen=True)
class Source:
    """A data set: the training examples and the test examples.

    `notes` are sentences for the user about what a reader guessed, changed or dropped.
    """

    train: Examples
    test: Examples
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """The number of classes: the largest label plus one."""
        return int(max(self.train.targets.max(), self.test.targets.max())) + 1


def _are_valid_offsets(offsets: NDArray[np.int64], examples: int) -> bool:
    rising = len(offsets) > 1 and bool((np.diff(offsets) > 0).all())
    return rising and offsets[0] == 0 and offsets[-1] == examples
