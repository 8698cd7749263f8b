"""Partitions of the examples among clients.

A partition is the list `[rows of client 0, rows of client 1, ...]`. All but `drawn` use every row exactly once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Rows = NDArray[np.int64]


def iid(labels: Labels, clients: int, rng: np.random.Generator) -> list[Rows]:
    """Deal the examples out evenly and at random."""
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]


def shards(labels: Labels, clients: int, rng: np.random.Generator, per_client: int = 2) -> list[Rows]:
    """McMahan et al. 2017: sort by class, cut into `clients * per_client` shards, deal them out at random."""
    order = rng.permutation(len(labels))
    pieces = np.array_split(order[np.argsort(labels[order], kind="stable")], clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[i] for i in numbers])) for numbers in dealt]


def dirichlet(labels: Labels, clients: int, rng: np.random.Generator, alpha: float = 0.1) -> list[Rows]:
    """Wang & Ji 2024: each client draws its label distribution from Dir(`alpha`), and each class is
    split in proportion to the clients' weights for it. Sizes differ; every client gets at least one example.
    """
    classes = int(labels.max()) + 1
    weights = rng.dirichlet(np.full(classes, alpha), size=clients)
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        total = weights[:, label].sum()
        shares = np.cumsum(weights[:, label] / total) if total else np.arange(1, clients + 1) / clients
        cuts = np.round(shares[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return _fill_empty([np.sort(np.concatenate(part)) for part in parts])


def by_site(sites: tuple[str, ...]) -> tuple[list[Rows], list[str]]:
    """Return the rows of each site, and the sites' names in alphabetical order; `sites [n]` has one per example."""
    names = sorted(set(sites))
    site_of_row = np.array(sites)
    return [np.flatnonzero(site_of_row == name) for name in names], names


def drawn(
    labels: Labels, clients: int, rng: np.random.Generator, mean: int, sigma: float, alpha: float
) -> tuple[Rows, NDArray[np.int64]]:
    """Draw each client's examples from all examples with replacement; there may be more clients than examples.

    Sizes are lognormal with this `mean`, `sigma` as the deviation of their logarithms, and at least 1. The classes of
    each client follow Dir(`alpha`). Returns the rows of all clients, concatenated, and their offsets `[N + 1]`.
    """
    sizes = np.full(clients, mean)
    if sigma:
        sizes = np.maximum(1, np.round(mean * rng.lognormal(-(sigma**2) / 2, sigma, clients))).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    firsts = np.cumsum(counts) - counts
    rows = np.empty(offsets[-1], dtype=np.int64)
    for start in range(0, clients, 1000):  # in pieces: a matrix of all examples by classes is too large for memory
        piece = slice(start, min(start + 1000, clients))
        shares = rng.dirichlet(np.full(len(counts), alpha), piece.stop - piece.start) * (counts > 0)
        limits = np.cumsum(shares, axis=1)
        owners = np.repeat(np.arange(len(limits)), sizes[piece])
        points = rng.random(len(owners)) * limits[owners, -1]
        classes = (points[:, None] > limits[owners]).sum(axis=1)
        picks = firsts[classes] + (rng.random(len(owners)) * counts[classes]).astype(np.int64)
        rows[offsets[piece.start] : offsets[piece.stop]] = order[picks]
    return rows, offsets


def _fill_empty(parts: list[Rows]) -> list[Rows]:
    """Give each client without examples one from the largest client; changes and returns `parts`."""
    for client, rows in enumerate(parts):
        if not len(rows):
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            parts[client], parts[largest] = parts[largest][:1], parts[largest][1:]
    return parts
