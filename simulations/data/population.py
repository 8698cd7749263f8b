"""The examples of all clients in one store; offsets assign them to clients, so that a client costs eight bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.data.examples import Examples


@dataclass(frozen=True)
class Population:
    """N clients and their examples.

    Client `k` has the examples `rows[offsets[k]:offsets[k + 1]]` of `store`; if `rows` is None, it has
    `store[offsets[k]:offsets[k + 1]]`. `offsets [N + 1]` start at 0. The store may be a memory-mapped file.
    """

    store: Examples
    offsets: NDArray[np.int64]
    rows: Tensor | None = None

    @classmethod
    def of(cls, examples: Examples, parts: Sequence[NDArray[np.int64]]) -> Population:
        """Return the population in which client `k` has the rows `parts[k]` of `examples`."""
        return cls(examples, np.cumsum([0, *map(len, parts)]), torch.from_numpy(np.concatenate(parts)))

    def in_order(self) -> Population:
        """Return the same clients on a copy of the store in which each client's examples are contiguous.

        Returns this population if it has no `rows`, if its store is mapped, or if the copy would be larger.
        """
        if self.rows is None or self.store.is_mapped or len(self.rows) > len(self.store):
            return self
        return Population(self.store.rows(self.rows), self.offsets)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The number of examples of each client, `[N]`."""
        return np.diff(self.offsets)

    def store_positions_of(self, client: int) -> Tensor:
        """Return the indices of a client's examples in the store, `[n]`."""
        return self.store_positions([client], torch.arange(self.size(client))[None])[0]

    def labels(self, classes: int) -> NDArray[np.float64]:
        """Return the share of each class in each client's examples, `[N, C]`."""
        if classes == 1:
            return np.ones((len(self), 1))
        targets = self.store.labels if self.rows is None else self.store.labels[self.rows]
        clients = np.repeat(np.arange(len(self)), self.sizes)
        counts = np.bincount(clients * classes + targets.numpy(), minlength=len(self) * classes).reshape(-1, classes)
        shares: NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
        return shares

    def with_client(self, examples: Examples) -> Population:
        """Return this population with one more client, which has `examples`."""
        rows = self.rows if self.rows is not None else torch.arange(int(self.offsets[-1]))
        both = [self.store, examples]
        strata = None if self.store.strata is None else torch.cat([each.labels for each in both])
        inputs, targets = (torch.cat([getattr(each, part) for each in both]) for part in ("inputs", "targets"))
        store = Examples(inputs, targets, strata=strata)
        new_rows = torch.arange(len(self.store), len(store))
        return Population(store, np.append(self.offsets, self.offsets[-1] + len(examples)), torch.cat([rows, new_rows]))

    def with_pool(self, clients: Sequence[int]) -> Population:
        """Return this population with one more client, which has the examples of all `clients`."""
        rows = self.rows if self.rows is not None else torch.arange(int(self.offsets[-1]))
        pool = torch.cat([rows[int(self.offsets[k]) : int(self.offsets[k + 1])] for k in clients])
        return Population(self.store, np.append(self.offsets, self.offsets[-1] + len(pool)), torch.cat([rows, pool]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def size(self, client: int) -> int:
        """Return the number of examples of a client."""
        return int(self.offsets[client + 1] - self.offsets[client])

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """Return a client's inputs `[n, ...]` and targets `[n, ...]`, as views of the store where possible."""
        span = slice(int(self.offsets[client]), int(self.offsets[client + 1]))
        places = span if self.rows is None else self.rows[span].to(self.store.targets.device)
        return self.store.inputs_at(places), self.store.targets[places]

    def flat_inputs(self, client: int) -> Tensor:
        """Return a client's inputs as vectors, `[n, in]`."""
        return self.examples(client)[0].flatten(1)

    def fingerprint(self, client: int) -> str:
        """Return the SHA-256 of a client's inputs."""
        if client not in self._fingerprints:
            self._fingerprints[client] = sha256(self.flat_inputs(client).cpu().contiguous().numpy().data).hexdigest()
        return self._fingerprints[client]

    @cached_property
    def _fingerprints(self) -> dict[int, str]:
        return {}

    def store_positions(self, clients: Sequence[int], rows: Tensor) -> Tensor:
        """Return indices in the store, of the shape of `rows [K, ...]`.

        `rows[k]` are positions among the examples of `clients[k]`, counted from 0.
        """
        first = torch.from_numpy(self.offsets[list(clients)])
        places = rows + first.view(-1, *[1] * (rows.dim() - 1))
        return places if self.rows is None else self.rows[places]


def client_names(count: int) -> list[str]:
    """Return `client-00`, `client-01`, ..., zero-padded so that alphabetical order is numerical order."""
    return [f"client-{i:0{len(str(count - 1))}d}" for i in range(count)]
