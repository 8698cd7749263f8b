"""A memory of one update per site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Updates:
    """The update of each site that was heard: `rows [n, P]`, one per name in `nodes`, which are in order."""

    nodes: tuple[str, ...] = ()
    rows: Tensor | None = None

    def of(self, nodes: Sequence[str], like: Tensor) -> Tensor:
        """The updates of `nodes`, zero for those not heard; `[K, P]`, as `like [K, P]`."""
        found = torch.zeros_like(like)
        place = {node: row for row, node in enumerate(self.nodes)}
        for index, node in enumerate(nodes):
            if node in place and self.rows is not None:
                found[index] = self.rows[place[node]]
        return found

    def replaced(self, nodes: Sequence[str], rows: Tensor) -> Updates:
        """With `rows [K, P]` for `nodes`."""
        kept = {} if self.rows is None else dict(zip(self.nodes, self.rows, strict=True))
        kept |= dict(zip(nodes, rows, strict=True))
        if not kept:
            return self
        names = sorted(kept)
        return Updates(tuple(names), torch.stack([kept[name] for name in names]))

    def total(self, like: Tensor) -> Tensor:
        """The sum of all, `[P]` float64; zeros as long as `like [P]` when there are none."""
        if self.rows is None:
            return torch.zeros_like(like, dtype=torch.float64)
        return self.rows.sum(dim=0, dtype=torch.float64)
