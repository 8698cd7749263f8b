"""The table `[partition]`: how the examples are spread over clients. Each kind has keys of its own."""

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
Spread = tuple[list[str], Population]  # the clients' names and their examples


class _Dealt(Settings):
    """Every example goes to one of `clients`."""

    clients: int = Field(10, ge=1)

    def spread(self, train: Examples, rng: np.random.Generator) -> Spread:
        """The clients' names and their examples. Raises `ValueError` for more clients than examples."""
        if self.pieces > len(train):
            raise ValueError(
                f"partition.clients = {self.clients} needs {self.pieces} examples or more and there are {len(train)}; "
                "take fewer clients, or let them draw: partition.kind = 'drawn'."
            )
        return client_names(self.clients), Population.of(train, self.parts(train, rng))

    @property
    def pieces(self) -> int:
        """How many examples it takes at least."""
        return self.clients

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """The rows of each client."""
        raise NotImplementedError


class DirichletSettings(_Dealt):
    """Each client's classes follow Dir(`alpha`): a small one means few classes per client."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(0.1, gt=0)

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """See `partition.dirichlet`."""
        return dirichlet(train.targets.numpy(), self.clients, rng, self.alpha)


class ShardsSettings(_Dealt):
    """Each client gets `shards_per_client` stretches of the examples sorted by class."""

    kind: Literal["shards"] = "shards"
    shards_per_client: int = Field(2, ge=1)

    @property
    def pieces(self) -> int:
        """An example for each shard."""
        return self.clients * self.shards_per_client

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """See `partition.shards`."""
        return shards(train.targets.numpy(), self.clients, rng, self.shards_per_client)


class IidSettings(_Dealt):
    """Evenly and at random."""

    kind: Literal["iid"] = "iid"

    def parts(self, train: Examples, rng: np.random.Generator) -> list[Rows]:
        """See `partition.iid`."""
        return iid(train.targets.numpy(), self.clients, rng)


class SiteSettings(Settings):
    """The data's own sites: one table for each, or `offsets` beside arrays."""

    kind: Literal["site"] = "site"

    def spread(self, train: Examples, rng: np.random.Generator) -> Spread:
        """The sites' names and their examples. Raises `ValueError` where the data have none."""
        if train.offsets is not None:
            return client_names(len(train.offsets) - 1), Population(train, train.offsets)
        if train.sites is None:
            raise ValueError(
                "The data have no sites for partition.kind = 'site'; "
                "give a folder with one table per site, offsets, or another partition."
            )
        parts, names = by_site(train.sites)
        return names, Population.of(train, parts)


class DrawnSettings(Settings):
    """Each client draws about `examples` from all, with replacement: sizes are lognormal with `sigma`, classes
    Dirichlet.

    So there may be more clients than examples.
    """

    kind: Literal["drawn"] = "drawn"
    clients: int = Field(10, ge=1)
    alpha: float = Field(0.1, gt=0)
    examples: int = Field(100, ge=1)
    sigma: float = Field(0.0, ge=0)

    def spread(self, train: Examples, rng: np.random.Generator) -> Spread:
        """The clients' names and their examples."""
        rows, offsets = drawn(train.targets.numpy(), self.clients, rng, self.examples, self.sigma, self.alpha)
        return client_names(self.clients), Population(train, offsets, torch.from_numpy(rows))


class CustomPartition(CustomSettings):
    """A function of the user's own: `function(targets [n], rng, **options)` returns the rows of each client, in a
    list or by the clients' names. The entry-point group is `corymb.partitions`.
    """

    def spread(self, train: Examples, rng: np.random.Generator) -> Spread:
        """The clients' names and their examples. Raises `ValueError` for rows that the data do not have."""
        parts = PARTITIONS.find(self.reference)(train.targets.numpy(), rng, **self.options)
        names = list(parts) if isinstance(parts, dict) else client_names(len(parts))
        rows = [np.asarray(part, dtype=np.int64) for part in (parts.values() if isinstance(parts, dict) else parts)]
        if not rows or not all(len(part) and part.min() >= 0 and part.max() < len(train) for part in rows):
            raise ValueError(
                f"The partition {self.reference!r} must give each client one row or more, from 0 to {len(train) - 1}."
            )
        return names, Population.of(train, rows)


KINDS = ("dirichlet", "shards", "iid", "site", "drawn")
PartitionSettings = Annotated[
    DirichletSettings | ShardsSettings | IidSettings | SiteSettings | DrawnSettings | CustomPartition,
    Field(discriminator="kind"),
    BeforeValidator(with_kind("dirichlet", KINDS, PARTITIONS)),
]
