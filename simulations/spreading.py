"""Examples spread over clients as an experiment says."""

from __future__ import annotations

import numpy as np
import torch

from corymb.simulations.data import Examples
from corymb.simulations.grid import client_names
from corymb.simulations.partition import by_site, dirichlet, drawn, iid, shards
from corymb.simulations.population import Population
from corymb.simulations.settings import PartitionSettings


def spread(
    train: Examples, settings: PartitionSettings, source: str, rng: np.random.Generator
) -> tuple[list[str], Population]:
    """The clients' names and their examples.

    Raises `ValueError` for sites where there are none, or more clients than examples.
    """
    if settings.kind == "site":
        if train.offsets is not None:
            return client_names(len(train.offsets) - 1), Population(train, train.offsets)
        if train.sites is None:
            raise ValueError(
                f"The data {source!r} has no sites for partition.kind = 'site'; "
                "give a folder with one table per site, offsets, or another partition."
            )
        parts, names = by_site(train.sites)
        return names, Population.of(train, parts)
    labels, clients = train.targets.numpy(), settings.clients
    names = client_names(clients)
    if settings.kind == "drawn":
        rows, offsets = drawn(labels, clients, rng, settings.examples, settings.sigma, settings.alpha)
        return names, Population(train, offsets, torch.from_numpy(rows))
    pieces = clients * settings.shards_per_client if settings.kind == "shards" else clients
    if pieces > len(labels):
        raise ValueError(
            f"partition.clients = {clients} needs {pieces} examples or more and there are {len(labels)}; "
            "take fewer clients, or let them draw: partition.kind = 'drawn'."
        )
    if settings.kind == "iid":
        return names, Population.of(train, iid(labels, clients, rng))
    if settings.kind == "shards":
        return names, Population.of(train, shards(labels, clients, rng, settings.shards_per_client))
    return names, Population.of(train, dirichlet(labels, clients, rng, settings.alpha))
