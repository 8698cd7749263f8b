"""The batches that each client of a block draws, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.client.app import batch_generator
from corymb.client.batches import drawn_rows

UNUSED = torch.Generator()  # where nothing is shuffled


@dataclass(frozen=True)
class Batches:
    """`rows [K, S, B]` of each client's own examples, `weights [K, S, B]`: one over the length of the batch, and zero
    in its padding; `steps [K]` of each client.
    """

    rows: Tensor
    weights: Tensor
    steps: list[int]

    @classmethod
    def drawn(
        cls,
        sizes: Sequence[int],
        settings: TrainSettings,
        sites: Sequence[tuple[int, int, int]],
        dtype: torch.dtype = torch.float32,
    ) -> Batches:
        """What clients of so many examples draw in a round; weights have the model's `dtype`.

        Their generators follow from `sites`: seed, client and round of each.
        """
        if settings.shuffle:
            own = zip(sizes, sites, strict=True)
            drawn = [drawn_rows(size, settings, batch_generator(*site)) for size, site in own]
        else:
            of_size = {size: drawn_rows(size, settings, UNUSED) for size in set(sizes)}
            drawn = [of_size[size] for size in sizes]
        width = max(max(lengths) for _, lengths in drawn)
        steps = [len(lengths) for _, lengths in drawn]
        if all(len(order) == max(steps) * width for order, _ in drawn):  # nothing to pad
            rows = torch.stack([order for order, _ in drawn]).view(len(drawn), max(steps), width)
            return cls(rows, torch.full(rows.shape, 1 / width, dtype=dtype), steps)
        rows = torch.zeros(len(drawn), max(steps), width, dtype=torch.int64)
        weights = torch.zeros(len(drawn), max(steps), width, dtype=dtype)
        column = torch.arange(width)
        for k, (order, taken) in enumerate(drawn):
            lengths = torch.tensor(taken)[:, None]
            there = column < lengths
            rows[k, : len(taken)][there] = order
            weights[k, : len(taken)] = there.to(dtype) / lengths
        return cls(rows, weights, steps)

    def to(self, device: torch.device) -> Batches:
        """The same on `device`."""
        return self if device.type == "cpu" else Batches(self.rows.to(device), self.weights.to(device), self.steps)

    def lengths_at(self, step: int) -> list[int]:
        """The length of each client's batch in a step; 0 after its last."""
        lengths: list[int] = (self.weights[:, step] > 0).sum(dim=1).tolist()
        return lengths
