"""Examples as tensors, and a data set as those to train on and those to test on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """`inputs [n, ...]`, `targets [n]` int64, and, if the data tell, which site each is from: `sites [n]`, or the
    `offsets [N + 1]` of N sites that lie one after another.

    Inputs are float32; or bytes, of which `scaled` says what a model takes: `(input / 255 - mean) / deviation`.
    """

    inputs: Tensor
    targets: Tensor
    sites: tuple[str, ...] | None = None
    offsets: NDArray[np.int64] | None = None
    scaled: tuple[float, float] = (0.0, 1.0)
    is_mapped: bool = False  # the inputs lie in a file and are read when somebody asks for them

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"there are {len(self.inputs)} inputs for {len(self.targets)} labels")
        if self.offsets is not None and not _are_offsets(self.offsets, len(self)):
            raise ValueError(f"its offsets do not rise from 0 to the {len(self)} examples; give one more than sites")
        if len(self.targets) and self.targets.min() < 0:
            raise ValueError(f"the label {int(self.targets.min())} is negative; count classes from 0")

    def __len__(self) -> int:
        return len(self.targets)

    def inputs_at(self, places: slice | Tensor) -> Tensor:
        """The inputs at `places`, as a model takes them."""
        if isinstance(places, slice):
            inputs = self.inputs[places]
        else:  # several times as fast as indexing with a tensor
            inputs = self.inputs.index_select(0, places.flatten()).unflatten(0, places.shape)
        if inputs.dtype != torch.uint8:
            return inputs
        mean, deviation = self.scaled
        return inputs.float().div_(255).sub_(mean).div_(deviation)

    def to(self, device: torch.device) -> Examples:
        """With all examples on `device`, unless they are mapped, and so may be more than it holds."""
        if self.is_mapped or self.inputs.device == device:
            return self
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def normalised(self, mean: float, deviation: float) -> Examples:
        """With inputs that are given to a model as `(input - mean) / deviation`."""
        if self.inputs.dtype == torch.uint8:
            return replace(self, scaled=(mean, deviation))
        return replace(self, inputs=(self.inputs - mean) / deviation)

    def rows(self, rows: Tensor) -> Examples:
        """The examples at `rows [m]`."""
        sites = None if self.sites is None else tuple(self.sites[row] for row in rows.tolist())
        return replace(
            self, inputs=self.inputs[rows], targets=self.targets[rows], sites=sites, offsets=None, is_mapped=False
        )


@dataclass(frozen=True)
class Source:
    """Examples to train on and to test on."""

    train: Examples
    test: Examples

    @property
    def classes(self) -> int:
        """How many classes there are, counting from label 0."""
        return int(max(self.train.targets.max(), self.test.targets.max())) + 1


def _are_offsets(offsets: NDArray[np.int64], examples: int) -> bool:
    rising = len(offsets) > 1 and bool((np.diff(offsets) > 0).all())
    return rising and offsets[0] == 0 and offsets[-1] == examples
