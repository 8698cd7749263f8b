"""A test part for every client."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population


def with_tests(
    population: Population, names: Sequence[str], test: Examples, share: float, rng: np.random.Generator
) -> tuple[Population, Population]:
    """Return the clients' training examples and their test examples.

    If the test set names the clients as its sites, each client has the test examples of its site. Otherwise this
    `share` of its own examples, drawn at random, is no longer trained on; a client with one example has no test part.
    """
    if test.sites is not None and set(test.sites) & set(names) and population.store.sites is not None:
        sites = np.array(test.sites)
        return population, Population.of(test, [np.flatnonzero(sites == name) for name in names])
    return split_off(population, share, rng)


def split_off(population: Population, share: float, rng: np.random.Generator) -> tuple[Population, Population]:
    """Return the clients without this `share` of each one's examples, drawn at random, and the share.

    A client with one example keeps it.
    """
    train_parts, test_parts = [], []
    for client in range(len(population)):
        rows = population.store_positions_of(client).numpy()
        different = np.unique(rows)  # a client may have drawn an example several times
        taken = rng.permutation(different)[: _size(len(different), share)]
        is_test = np.isin(rows, taken)
        train_parts.append(rows[~is_test])
        test_parts.append(np.sort(taken))
    return Population.of(population.store, train_parts), Population.of(population.store, test_parts)


def _size(examples: int, share: float) -> int:
    return min(max(1, round(share * examples)), examples - 1)
