"""What all rules of a seed meet: the clients with their examples, the test, and what the server holds itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.data.attacks import ShuffledLabels, shuffled_labels
from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.participation import Participation, Probabilities
from corymb.simulations.data.partition_settings import DrawnSettings
from corymb.simulations.data.population import Population
from corymb.simulations.experiments.experiment import Experiment

TARGET = "target"


@dataclass(frozen=True)
class Scenario:
    """The clients of a seed: their names, their examples, their label distributions `labels [N, C]`.

    `hostile` are the numbers of the hostile clients; `proxy` is what the server holds, of what was the test set.
    """

    names: list[str]
    population: Population
    labels: NDArray[np.float64]
    test: Examples
    proxy: Examples | None
    hostile: tuple[int, ...] = ()

    @property
    def hostile_names(self) -> list[str]:
        """The names of the hostile clients."""
        return [self.names[row] for row in self.hostile]


def participation_of(
    experiment: Experiment, scenario: Scenario, seed: int
) -> tuple[Participation, Probabilities | None]:
    """The process of `seed` from its beginning, and each client's probability of being online `[N]` where it has one.

    Raises `ValueError` for a process that does not fit the clients.
    """
    return experiment.participation.make(scenario.labels, np.random.default_rng([seed, 2]))


def scenario_of(experiment: Experiment, source: Source, seed: int) -> Scenario:
    """The scenario of `seed` in the data of `source`.

    Raises `ValueError` for more clients than examples, sites where there are none, or more of anything than there is.
    """
    train, test, proxy = source.train, source.test, None
    rng = np.random.default_rng([seed, 3])
    if experiment.proxy.examples:
        rows = _balanced(test.targets, experiment.proxy.examples, rng)
        proxy, test = test.rows(rows), test.rows(_others(len(test), rows))
    if experiment.data.examples is not None:
        train = train.rows(_chosen(len(train), experiment.data.examples, "data.examples", rng))
    target = experiment.target
    wanted = None
    if target.examples:
        if train.inputs.dtype != torch.float32:
            raise ValueError(
                f"target.examples needs inputs of float32 and they are {train.inputs.dtype}; convert them."
            )
        rows = _chosen(len(train), target.examples, "target.examples", rng)
        wanted, train = _noisy(train.rows(rows), target.noise, seed), train.rows(_others(len(train), rows))
        test = _noisy(test, target.noise, seed + 1)
    names, population = experiment.partition.spread(train, np.random.default_rng([seed, 1]))
    hostile: tuple[int, ...] = ()
    if experiment.attack.clients:
        if experiment.attack.clients > len(names):
            raise ValueError(f"attack.clients = {experiment.attack.clients} is more than the {len(names)} clients.")
        hostile = tuple(sorted(rng.choice(len(names), experiment.attack.clients, replace=False).tolist()))
    if hostile and isinstance(experiment.attack, ShuffledLabels):
        population = _mislabelled(population, hostile, experiment, rng)
    if wanted is not None:
        names, population = [*names, TARGET], population.joined_by(wanted)
    return Scenario(names, population, population.labels(source.classes), test, proxy, hostile)


def _mislabelled(
    population: Population, hostile: tuple[int, ...], experiment: Experiment, rng: np.random.Generator
) -> Population:
    if isinstance(experiment.partition, DrawnSettings):
        raise ValueError(
            "attack.kind = 'shuffled_labels' would change the labels of others, who draw the same examples under "
            "partition.kind = 'drawn'; take another kind of either."
        )
    targets = population.store.targets.clone()
    for row in hostile:
        rows = population.places_of(row)
        targets[rows] = shuffled_labels(population.store.targets, rows.numpy(), rng)
    return replace(population, store=replace(population.store, targets=targets))


def _chosen(count: int, wanted: int, key: str, rng: np.random.Generator) -> Tensor:
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
