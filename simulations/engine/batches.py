"""The batches that each client of a block draws, padded to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.client.app import batch_generator
from corymb.client.batches import draw_rows

UNUSED = torch.Generator()  # a placeholder for draws without shuffling


@dataclass(frozen=True)
class Batches:
    """The batches of K clients over S steps of up to B examples.

    `rows [K, S, B]` are indices into each client's own examples. `weights [K, S, B]` are one over the length of the
    batch for an example and zero for padding. `steps [K]` is the number of steps of each client.
    """

    rows: Tensor
    weights: Tensor
    steps: list[int]

    @classmethod
    def draw(
        cls,
        sizes: Sequence[int],
        settings: TrainSettings,
        seed_keys: Sequence[tuple[int, int, int]],
        dtype: torch.dtype = torch.float32,
        no_single: bool = False,
    ) -> Batches:
        """Draw one round of batches for clients with `sizes` examples; `dtype` is the model's, for the weights.

        `no_single` says that no batch may have one example; see `training_batches`. `seed_keys` holds the seed, the
        client and the round that seed each client's generator.
        """
        if settings.shuffle:
            pairs = zip(sizes, seed_keys, strict=True)
            drawn = [draw_rows(size, settings, batch_generator(*key), no_single) for size, key in pairs]
        else:
            by_size = {size: draw_rows(size, settings, UNUSED, no_single) for size in set(sizes)}
            drawn = [by_size[size] for size in sizes]
        width = max(max(lengths) for _, lengths in drawn)
        steps = [len(lengths) for _, lengths in drawn]
        if all(len(order) == max(steps) * width for order, _ in drawn):  # nothing to pad
            rows = torch.stack([order for order, _ in drawn]).view(len(drawn), max(steps), width)
            return cls(rows, torch.full(rows.shape, 1 / width, dtype=dtype), steps)
        rows = torch.zeros(len(drawn), max(steps), width, dtype=torch.int64)
        weights = torch.zeros(len(drawn), max(steps), width, dtype=dtype)
        column = torch.arange(width)
        for k, (order, batch_lengths) in enumerate(drawn):
            lengths = torch.tensor(batch_lengths)[:, None]
            is_example = column < lengths
            rows[k, : len(batch_lengths)][is_example] = order
            weights[k, : len(batch_lengths)] = is_example.to(dtype) / lengths
        return cls(rows, weights, steps)

    def to(self, device: torch.device) -> Batches:
        """Return the same batches on `device`."""
        return self if device.type == "cpu" else Batches(self.rows.to(device), self.weights.to(device), self.steps)

    def lengths_at(self, step: int) -> list[int]:
        """Return the length of each client's batch in a step; 0 for a client that has finished."""
        lengths: list[int] = (self.weights[:, step] > 0).sum(dim=1).tolist()
        return lengths
