"""Examples as tensors, and a data set as its training and test examples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class Examples:
    """Inputs, targets and, optionally, the sites that the examples come from.

    `inputs [n, ...]` are float32, int64 such as tokens, or uint8 pixels, which `inputs_at` converts to
    `(input / 255 - mean) / deviation` with `scaled = (mean, deviation)`, numbers or one number per channel.
    `targets [n, ...]` are int64 class numbers from 0, or what the task has in their place. `strata [n]` int64 stand
    for labels where the targets are no class numbers. Sites are given either by
    `sites [n]`, the site's name for each example, or by `offsets [N + 1]`, where the examples of each of N sites are
    contiguous. Raises `ValueError` if lengths, offsets or labels are invalid.
    """

    inputs: Tensor
    targets: Tensor
    sites: tuple[str, ...] | None = None
    offsets: NDArray[np.int64] | None = None
    scaled: tuple[Numbers, Numbers] = (0.0, 1.0)
    is_mapped: bool = False  # the inputs are a memory-mapped file, read on access
    strata: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"there are {len(self.inputs)} inputs for {len(self.targets)} labels; give one label per input"
            )
        if self.offsets is not None and not _are_valid_offsets(self.offsets, len(self)):
            raise ValueError(
                f"the offsets must rise from 0 to {len(self)}, the number of examples; give N + 1 for N sites"
            )
        if self.targets.dim() == 1 and not self.targets.is_floating_point() and len(self) and self.targets.min() < 0:
            raise ValueError(f"the label {int(self.targets.min())} is negative; number the classes from 0")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Tensor:
        """The label of each example, or what stands for it, `[n]` int64.

        Raises `ValueError` for tokens, which have none.
        """
        if self.strata is not None:
            return self.strata
        if self.targets.dim() > 1 or self.targets.is_floating_point():
            raise ValueError("the targets are no labels by which examples could be divided; use 'iid' or 'site'")
        return self.targets

    def inputs_at(self, places: slice | Tensor) -> Tensor:
        """Return the inputs at the indices `places`, as float32 inputs of a model."""
        if isinstance(places, slice):
            inputs = self.inputs[places]
        else:  # index_select is several times as fast as indexing with a tensor
            inputs = self.inputs.index_select(0, places.flatten()).unflatten(0, places.shape)
        if inputs.dtype != torch.uint8:
            return inputs
        mean, deviation = (self._by_channel(numbers, inputs.device) for numbers in self.scaled)
        return inputs.float().div_(255).sub_(mean).div_(deviation)

    def _by_channel(self, numbers: Numbers, device: torch.device) -> Tensor | float:
        """Return `numbers` in a shape that broadcasts over inputs `[..., C, H, W]`."""
        if isinstance(numbers, (int, float)):
            return numbers
        if self.inputs.dim() < 2 or len(numbers) != self.inputs.shape[1]:
            channels = self.inputs.shape[1] if self.inputs.dim() > 1 else 0
            raise ValueError(f"data.mean and data.deviation have {len(numbers)} numbers for {channels} channels")
        return torch.tensor(numbers, device=device).view(-1, *[1] * (self.inputs.dim() - 2))

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`. Mapped examples stay where they are, as they may exceed its memory."""
        if self.is_mapped or self.inputs.device == device:
            return self
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def normalised(self, mean: Numbers, deviation: Numbers) -> Examples:
        """Return the examples with `(input - mean) / deviation` as inputs of a model.

        Raises `ValueError` for integers, which would no longer be any.
        """
        if self.inputs.dtype == torch.uint8:
            return replace(self, scaled=(mean, deviation))
        if (mean, deviation) == (0.0, 1.0):
            return self
        if not self.inputs.is_floating_point():
            raise ValueError("data.mean and data.deviation do not apply to integer inputs")
        device = self.inputs.device
        return replace(
            self, inputs=(self.inputs - self._by_channel(mean, device)) / self._by_channel(deviation, device)
        )

    def rows(self, rows: Tensor) -> Examples:
        """Return the examples at the indices `rows [m]`."""
        sites = None if self.sites is None else tuple(self.sites[row] for row in rows.tolist())
        strata = None if self.strata is None else self.strata[rows]
        return replace(
            self, inputs=self.inputs[rows], targets=self.targets[rows], sites=sites, offsets=None, is_mapped=False,
            strata=strata,
        )  # fmt: skip


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
        """The number of classes, or of strata: the largest label plus one; 1 for examples without labels."""
        try:
            return int(max(self.train.labels.max(), self.test.labels.max())) + 1
        except ValueError:
            return 1


def _are_valid_offsets(offsets: NDArray[np.int64], examples: int) -> bool:
    rising = len(offsets) > 1 and bool((np.diff(offsets) > 0).all())
    return rising and offsets[0] == 0 and offsets[-1] == examples
