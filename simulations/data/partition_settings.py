"""The table `[partition]`: how the examples are divided among clients. Each kind has its own keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from corymb.protocol.settings import Settings
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.kinds import CustomSettings, with_kind
from corymb.simulations.data.partition import Rows, by_site, dirichlet, drawn, iid, shards
from corymb.simulations.data.population import Population, client_names
from corymb.strategies.core.registry import Registry

PARTITIONS: Registry[Any] = Registry("partition", {}, "corymb.partitions")
NamedPopulation = tuple[list[str], Population]  # the clients' names and their examples


class _Disjoint(Settings):
    """Partitions in which every example goes to exactly one of `clients`."""

    clients: int = Field(10, ge=1)
    """The number of clients."""

    def populate(self, train: Examples, rng: np.random.Generator) -> NamedPopulation:
        """Return the clients' names and examples. Raises `ValueError` if there are too few examples."""
        if self.min_examples > len(train):
            raise ValueError(
                f"partition.clients = {self.clients} needs at least {self.min_examples} examples, and there are "
                f"{len(train)}; use fewer clients, or partition.kind = 'drawn'."
            )
        return client_names(self.clients), Population.of(train, self.parts(train, rng))

    @property
    def min_examples(self) -> int:
        """The smallest number of examples that the partition needs."""
        return self.clients

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """Return the rows of each client."""
        raise NotImplementedError


class DirichletSettings(_Disjoint):
    """Each client's classes follow Dir(`alpha`): a small alpha means few classes per client."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.1, gt=0)
    """The concentration; a small one means few classes per client."""

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """See `partition.dirichlet`."""
        return dirichlet(train.labels.numpy(), self.clients, rng, self.alpha)


class ShardsSettings(_Disjoint):
    """The examples are sorted by class and cut into shards; each client gets `shards_per_client` of them."""

    kind: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)
    """The number of shards that each client gets."""

    @property
    def min_examples(self) -> int:
        """One example per shard."""
        return self.clients * self.shards_per_client

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """See `partition.shards`."""
        return shards(train.labels.numpy(), self.clients, rng, self.shards_per_client)


class IidSettings(_Disjoint):
    """The examples are dealt out evenly and at random."""

    kind: Literal["iid"] = "iid"

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """See `partition.iid`."""
        return iid(np.zeros(len(train), dtype=np.int64), self.clients, rng)


class SiteSettings(Settings):
    """One client per site of the data: the data have one table per site, or `offsets` beside the arrays."""

    kind: Literal["site"] = "site"

    def populate(self, train: Examples, rng: np.random.Generator) -> NamedPopulation:
        """Return the sites' names and examples. Raises `ValueError` if the data have no sites."""
        if train.offsets is not None:
            return client_names(len(train.offsets) - 1), Population(train, train.offsets)
        if train.sites is None:
            raise ValueError(
                "The data have no sites, which partition.kind = 'site' needs; give a folder with one table per site, "
                "add offsets to the arrays, or use another kind."
            )
        parts, names = by_site(train.sites)
        return names, Population.of(train, parts)


class DrawnSettings(Settings):
    """Each client draws its examples from all examples with replacement; there may be more clients than examples.

    Sizes are lognormal with mean `examples` and `sigma` as the deviation of their logarithms (0: all equal). Each
    client's classes follow Dir(`alpha`).
    """

    kind: Literal["drawn"] = "drawn"
    clients: int = Field(10, ge=1)
    """The number of clients."""
    alpha: float = Field(0.1, gt=0)
    """The concentration of the clients' classes."""
    examples: int = Field(100, ge=1)
    """The mean number of examples of a client."""
    sigma: float = Field(0.0, ge=0)
    """The standard deviation of the logarithm of the sizes; 0 gives all clients the same size."""

    def populate(self, train: Examples, rng: np.random.Generator) -> NamedPopulation:
        """Return the clients' names and examples."""
        rows, offsets = drawn(train.labels.numpy(), self.clients, rng, self.examples, self.sigma, self.alpha)
        return client_names(self.clients), Population(train, offsets, torch.from_numpy(rows))


class CustomPartition(CustomSettings):
    """A user's own function, given as "module:name" or by an entry point of group `corymb.partitions`.

    `function(targets [n], rng, **options)` returns the rows of each client, as a list or as a dict by client names.
    """

    def populate(self, train: Examples, rng: np.random.Generator) -> NamedPopulation:
        """Return the clients' names and examples. Raises `ValueError` for rows that the data do not have."""
        parts = self.call(PARTITIONS, train.targets.numpy(), rng)
        names = list(parts) if isinstance(parts, dict) else client_names(len(parts))
        rows = [np.asarray(part, dtype=np.int64) for part in (parts.values() if isinstance(parts, dict) else parts)]
        if not rows or not all(len(part) and part.min() >= 0 and part.max() < len(train) for part in rows):
            raise ValueError(
                f"The partition {self.reference!r} must return at least one row per client, from 0 to {len(train) - 1}."
            )
        return names, Population.of(train, rows)


KINDS = ("dirichlet", "shards", "iid", "site", "drawn")
PartitionSettings = Annotated[
    DirichletSettings | ShardsSettings | IidSettings | SiteSettings | DrawnSettings | CustomPartition,
    Field(discriminator="kind"),
    BeforeValidator(with_kind("dirichlet", KINDS, PARTITIONS)),
]
