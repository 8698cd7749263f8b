"""The scenario of a seed, which all rules share: clients and their examples, test set, and proxy data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.data.data_attacks import DataAttack
from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.participation import Participation, Probabilities
from corymb.simulations.data.partition_settings import DrawnSettings
from corymb.simulations.data.population import Population
from corymb.simulations.experiments.experiment import Experiment

TARGET = "target"


@dataclass(frozen=True)
class Scenario:
    """The clients of a seed and the data of the server.

    Client `k` has the name `names[k]`, examples in `population` and the label distribution `labels[k]` of
    `labels [N, C]`. `hostile` are the numbers of the hostile clients. `proxy` are the server's own examples; they are
    taken out of the original test set, and `test` is the rest.
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
    """Return a new participation process for `seed`, and the clients' probabilities of being online `[N]`, if any.

    Raises `ValueError` if the process does not fit the clients.
    """
    return experiment.participation.make(scenario.labels, np.random.default_rng([seed, 2]))


def scenario_of(experiment: Experiment, source: Source, seed: int) -> Scenario:
    """Draw the scenario of `seed` from the data of `source`.

    Raises `ValueError` if the settings need more clients, sites or examples than the data have.
    """
    train, test, proxy = source.train, source.test, None
    rng = np.random.default_rng([seed, 3])
    if experiment.proxy.examples:
        rows = _sample_balanced(test.targets, experiment.proxy.examples, rng)
        proxy, test = test.rows(rows), test.rows(_others(len(test), rows))
    if experiment.data.examples is not None:
        train = train.rows(_sample(len(train), experiment.data.examples, "data.examples", rng))
    target = experiment.target
    target_data = None
    if target.examples:
        if train.inputs.dtype != torch.float32:
            raise ValueError(f"target.examples needs float32 inputs, and these are {train.inputs.dtype}; convert them.")
        rows = _sample(len(train), target.examples, "target.examples", rng)
        target_data, train = _noisy(train.rows(rows), target.noise, seed), train.rows(_others(len(train), rows))
        test = _noisy(test, target.noise, seed + 1)
    names, population = experiment.partition.populate(train, np.random.default_rng([seed, 1]))
    hostile: tuple[int, ...] = ()
    if experiment.attack.clients:
        if experiment.attack.clients > len(names):
            raise ValueError(
                f"attack.clients = {experiment.attack.clients} is more than the {len(names)} clients; use fewer."
            )
        hostile = tuple(sorted(rng.choice(len(names), experiment.attack.clients, replace=False).tolist()))
    if hostile and isinstance(experiment.attack, DataAttack):
        population = _poisoned(population, hostile, experiment, experiment.attack, source.classes, rng)
    if target_data is not None:
        names, population = [*names, TARGET], population.with_client(target_data)
    return Scenario(names, population, population.labels(source.classes), test, proxy, hostile)


def _poisoned(
    population: Population,
    hostile: tuple[int, ...],
    experiment: Experiment,
    attack: DataAttack,
    classes: int,
    rng: np.random.Generator,
) -> Population:
    """Return `population` with the examples that the hostile clients have after `attack`."""
    if isinstance(experiment.partition, DrawnSettings):
        raise ValueError(
            f"attack.kind = {experiment.attack.kind!r} cannot be used with partition.kind = 'drawn', where clients "
            "share examples; use another attack or another partition."
        )
    rows = [population.store_positions_of(client).numpy() for client in hostile]
    return replace(population, store=attack.poison(population.store, rows, classes, rng))


def _sample(count: int, size: int, key: str, rng: np.random.Generator) -> Tensor:
    """Return `size` different row numbers below `count`, in order; errors name `key`."""
    if size > count:
        raise ValueError(f"{key} = {size} is more than the {count} training examples; use fewer.")
    return torch.from_numpy(np.sort(rng.choice(count, size, replace=False)))


def _sample_balanced(targets: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Return `size` rows, in order, with equally many of each class; the first classes get the remainder."""
    classes = int(targets.max()) + 1
    share, remainder = divmod(size, classes)
    rows = []
    for label in range(classes):
        candidates = np.flatnonzero(targets.numpy() == label)
        count = share + (label < remainder)
        if count >= len(candidates):
            raise ValueError(
                f"proxy.examples = {size} takes {count} examples of class {label} from the test set, which has "
                f"{len(candidates)} and must keep at least one; use fewer."
            )
        rows.append(rng.choice(candidates, count, replace=False))
    return torch.from_numpy(np.sort(np.concatenate(rows)))


def _others(count: int, rows: Tensor) -> Tensor:
    """Return the row numbers below `count` that are not in `rows`."""
    is_other = torch.ones(count, dtype=torch.bool)
    is_other[rows] = False
    return is_other.nonzero()[:, 0]


def _noisy(examples: Examples, deviation: float, seed: int) -> Examples:
    """Return `examples` with Gaussian noise of this standard deviation added to the inputs."""
    noise = torch.randn(examples.inputs.shape, generator=torch.Generator().manual_seed(seed))
    return replace(examples, inputs=examples.inputs + deviation * noise)
