"""A store of one update per client, for rules that remember past updates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Updates:
    """One update per client that has replied: `rows [n, P]`, one row per name in `nodes`, sorted by name."""

    nodes: tuple[str, ...] = ()
    rows: Tensor | None = None

    def of(self, nodes: Sequence[str], like: Tensor) -> Tensor:
        """Return the updates of `nodes`, `[K, P]`, with the dtype of `like [K, P]`; zero for clients without one."""
        updates = torch.zeros_like(like)
        row_of = {node: row for row, node in enumerate(self.nodes)}
        for index, node in enumerate(nodes):
            if node in row_of and self.rows is not None:
                updates[index] = self.rows[row_of[node]]
        return updates

    def replaced(self, nodes: Sequence[str], rows: Tensor) -> Updates:
        """Return a copy in which `rows [K, P]` are the updates of `nodes`."""
        row_of = {} if self.rows is None else dict(zip(self.nodes, self.rows, strict=True))
        row_of |= dict(zip(nodes, rows, strict=True))
        if not row_of:
            return self
        names = sorted(row_of)
        return Updates(tuple(names), torch.stack([row_of[name] for name in names]))

    def kept(self, nodes: Collection[str]) -> Updates:
        """Return a copy with the updates of `nodes` only: a client that left the federation no longer counts."""
        rows = [row for row, node in enumerate(self.nodes) if node in nodes]
        if self.rows is None or len(rows) == len(self.nodes):
            return self
        return Updates(tuple(self.nodes[row] for row in rows), self.rows[rows]) if rows else Updates()

    def total(self, like: Tensor) -> Tensor:
        """Return the sum of all updates, `[P]` float64; zeros of the length of `like [P]` if there are no updates."""
        if self.rows is None:
            return torch.zeros_like(like, dtype=torch.float64)
        return self.rows.sum(dim=0, dtype=torch.float64)
