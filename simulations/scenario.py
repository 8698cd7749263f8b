"""What all rules of a seed meet: the clients with their examples, the test, and what the server holds itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.attacks import shuffled_labels
from corymb.simulations.data import Examples, Source, load
from corymb.simulations.experiment import Experiment
from corymb.simulations.grid import client_names
from corymb.simulations.partition import by_site, dirichlet, iid, label_distributions, shards
from corymb.simulations.settings import DataSettings, PartitionSettings

TARGET = "target"
Parts = list[NDArray[np.int64]]


@dataclass(frozen=True)
class Scenario:
    """The clients of a seed: their names, their rows of `train`, their label distributions `labels [N, C]`.

    `hostile` are the numbers of the hostile clients; `proxy` is what the server holds, of what was the test set.
    """

    names: list[str]
    parts: Parts
    labels: NDArray[np.float64]
    train: Examples
    test: Examples
    proxy: Examples | None
    hostile: tuple[int, ...] = ()

    @property
    def hostile_names(self) -> list[str]:
        """The names of the hostile clients."""
        return [self.names[row] for row in self.hostile]


@lru_cache(maxsize=2)
def source_of(settings: DataSettings) -> Source:
    """The data, read once for all runs of an experiment."""
    return load(settings.source, **settings.model_dump(exclude={"source", "examples"}))


def scenario_of(experiment: Experiment, seed: int) -> Scenario:
    """The scenario of `seed`.

    Raises `ValueError` for more clients than examples, sites where there are none, or more of anything than there is.
    """
    source = source_of(experiment.data)
    train, test, proxy = source.train, source.test, None
    rng = np.random.default_rng([seed, 3])
    if experiment.proxy.examples:
        rows = _balanced(test.targets, experiment.proxy.examples, rng)
        proxy, test = test.rows(rows), test.rows(_others(len(test), rows))
    if experiment.data.examples is not None:
        train = train.rows(_drawn(len(train), experiment.data.examples, "data.examples", rng))
    target = experiment.target
    wanted = None
    if target.examples:
        rows = _drawn(len(train), target.examples, "target.examples", rng)
        wanted, train = _noisy(train.rows(rows), target.noise, seed), train.rows(_others(len(train), rows))
        test = _noisy(test, target.noise, seed + 1)
    names, parts = _spread(train, experiment.partition, experiment.data.source, np.random.default_rng([seed, 1]))
    hostile: tuple[int, ...] = ()
    if experiment.attack.clients:
        if experiment.attack.clients > len(names):
            raise ValueError(f"attack.clients = {experiment.attack.clients} is more than the {len(names)} clients.")
        hostile = tuple(sorted(rng.choice(len(names), experiment.attack.clients, replace=False).tolist()))
    if hostile and experiment.attack.kind == "labels":
        targets = train.targets.clone()
        for row in hostile:
            targets[torch.from_numpy(parts[row])] = shuffled_labels(train.targets, parts[row], rng)
        train = replace(train, targets=targets)
    if wanted is not None:
        parts.append(np.arange(len(train), len(train) + len(wanted)))
        names = [*names, TARGET]
        train = Examples(torch.cat([train.inputs, wanted.inputs]), torch.cat([train.targets, wanted.targets]))
    labels = label_distributions(train.targets.numpy(), parts, source.classes)
    return Scenario(names, parts, labels, train, test, proxy, hostile)


def _spread(
    train: Examples, settings: PartitionSettings, source: str, rng: np.random.Generator
) -> tuple[list[str], Parts]:
    labels = train.targets.numpy()
    if settings.kind == "site":
        if train.sites is None:
            raise ValueError(
                f"The data {source!r} has no sites for partition.kind = 'site'; "
                "give a folder with one table per site, or another partition."
            )
        parts, names = by_site(train.sites)
        return names, parts
    clients = settings.clients
    pieces = clients * settings.shards_per_client if settings.kind == "shards" else clients
    if pieces > len(labels):
        raise ValueError(
            f"partition.clients = {clients} needs {pieces} examples or more and there are {len(labels)}; "
            "take fewer clients."
        )
    if settings.kind == "iid":
        return client_names(clients), iid(labels, clients, rng)
    if settings.kind == "shards":
        return client_names(clients), shards(labels, clients, rng, settings.shards_per_client)
    return client_names(clients), dirichlet(labels, clients, rng, settings.alpha)


def _drawn(count: int, wanted: int, key: str, rng: np.random.Generator) -> Tensor:
    if wanted > count:
        raise ValueError(f"{key} = {wanted} is more than the {count} examples that there are.")
    return torch.from_numpy(np.sort(rng.choice(count, wanted, replace=False)))


def _balanced(targets: Tensor, wanted: int, rng: np.random.Generator) -> Tensor:
    """Rows with the same number of each class, the first classes one more where it does not come out even."""
    classes = int(targets.max()) + 1
    share, more = divmod(wanted, classes)
    rows = []
    for label in range(classes):
        mine = np.flatnonzero(targets.numpy() == label)
        size = share + (label < more)
        if size >= len(mine):
            raise ValueError(
                f"proxy.examples = {wanted} takes {size} of class {label}, of which the test set has {len(mine)}; "
                "take fewer."
            )
        rows.append(rng.choice(mine, size, replace=False))
    return torch.from_numpy(np.sort(np.concatenate(rows)))


def _others(count: int, rows: Tensor) -> Tensor:
    left = torch.ones(count, dtype=torch.bool)
    left[rows] = False
    return left.nonzero()[:, 0]


def _noisy(examples: Examples, deviation: float, seed: int) -> Examples:
    noise = torch.randn(examples.inputs.shape, generator=torch.Generator().manual_seed(seed))
    return replace(examples, inputs=examples.inputs + deviation * noise)
