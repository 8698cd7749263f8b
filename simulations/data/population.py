"""Everybody's examples in one store: which are whose is told by offsets, so a client costs eight bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.data.examples import Examples


@dataclass(frozen=True)
class Population:
    """Client `k` has the examples `rows[offsets[k]:offsets[k + 1]]` of the store, or, where `rows` is None, those
    places of the store itself. A store may be a memory-mapped file.
    """

    store: Examples
    offsets: NDArray[np.int64]
    rows: Tensor | None = None

    @classmethod
    def of(cls, examples: Examples, parts: Sequence[NDArray[np.int64]]) -> Population:
        """The clients whose rows of `examples` are `parts`."""
        return cls(examples, np.cumsum([0, *map(len, parts)]), torch.from_numpy(np.concatenate(parts)))

    def in_order(self) -> Population:
        """The same clients on a copy of the store in which each one's examples lie together, if it is no larger."""
        if self.rows is None or self.store.is_mapped or len(self.rows) > len(self.store):
            return self
        return Population(self.store.rows(self.rows), self.offsets)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many examples each client has, `[N]`."""
        return np.diff(self.offsets)

    def places_of(self, client: int) -> Tensor:
        """Where in the store a client's examples lie, `[n]`."""
        return self.places([client], torch.arange(self.size(client))[None])[0]

    def labels(self, classes: int) -> NDArray[np.float64]:
        """The share of each class at each client, `[N, C]`."""
        targets = self.store.targets if self.rows is None else self.store.targets[self.rows]
        clients = np.repeat(np.arange(len(self)), self.sizes)
        counts = np.bincount(clients * classes + targets.numpy(), minlength=len(self) * classes).reshape(-1, classes)
        shares: NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
        return shares

    def joined_by(self, more: Examples) -> Population:
        """With one more client, who has examples of its own."""
        rows = self.rows if self.rows is not None else torch.arange(int(self.offsets[-1]))
        store = Examples(torch.cat([self.store.inputs, more.inputs]), torch.cat([self.store.targets, more.targets]))
        theirs = torch.arange(len(self.store), len(store))
        return Population(store, np.append(self.offsets, self.offsets[-1] + len(more)), torch.cat([rows, theirs]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def size(self, client: int) -> int:
        """How many examples a client has."""
        return int(self.offsets[client + 1] - self.offsets[client])

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's inputs `[n, ...]` and targets `[n]`; views where the store allows."""
        mine = slice(int(self.offsets[client]), int(self.offsets[client + 1]))
        places = mine if self.rows is None else self.rows[mine].to(self.store.targets.device)
        return self.store.inputs_at(places), self.store.targets[places]

    def places(self, clients: Sequence[int], rows: Tensor) -> Tensor:
        """Where in the store the examples `rows [K, ...]` lie, counted from each client's first."""
        first = torch.from_numpy(self.offsets[list(clients)])
        places = rows + first.view(-1, *[1] * (rows.dim() - 1))
        return places if self.rows is None else self.rows[places]


def client_names(count: int) -> list[str]:
    """`client-00`, `client-01`, ...: their order by name is their order by number."""
    return [f"client-{i:0{len(str(count - 1))}d}" for i in range(count)]
