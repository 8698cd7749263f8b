"""The scenario of a seed, which all rules share: clients and their examples, test set, and proxy data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corymb.simulations.data.client_tests import split_off, with_tests
from corymb.simulations.data.data_attacks import DataAttack
from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.participation import Participation, Probabilities
from corymb.simulations.data.participation_settings import AlwaysSettings
from corymb.simulations.data.partition_settings import DrawnSettings
from corymb.simulations.data.population import Population
from corymb.simulations.experiments.experiment import Experiment

TARGET = "target"
POOLED = "central"  # the client that has all training examples


@dataclass(frozen=True)
class Scenario:
    """The clients of a seed and the data of the server.

    Client `k` has the name `names[k]`, examples in `population` and the label distribution `labels[k]` of
    `labels [N, C]`. `hostile` are the numbers of the hostile clients. `proxy` are the server's own examples; they are
    taken out of the original test set, and `test` is the rest. `tests` are the clients' own test examples, if they are
    tested. The clients `training` may train; `new` are those that only test. `validation` are training examples that
    the server holds back, and `validations` those of each client, if clients are tested.
    """

    names: list[str]
    population: Population
    labels: NDArray[np.float64]
    test: Examples
    proxy: Examples | None
    hostile: tuple[int, ...] = ()
    tests: Population | None = None
    training: tuple[int, ...] = ()
    new: tuple[int, ...] = ()
    validation: Examples | None = None
    validations: Population | None = None

    @property
    def new_names(self) -> list[str]:
        """The names of the clients that take no part in the training."""
        return [self.names[row] for row in self.new]

    @property
    def training_names(self) -> list[str]:
        """The names of the clients that may train."""
        return [self.names[row] for row in self.training]

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
    labels = scenario.labels[list(scenario.training)]
    if len(labels) == 1 and scenario.names[scenario.training[0]] == POOLED:
        return AlwaysSettings().make(labels, np.random.default_rng([seed, 2]))
    return experiment.participation.make(labels, np.random.default_rng([seed, 2]))


def scenario_of(experiment: Experiment, source: Source, seed: int, pooled: bool = False) -> Scenario:
    """Draw the scenario of `seed` from the data of `source`; `pooled` gives all training examples to one client.

    Raises `ValueError` if the settings need more clients, sites or examples than the data have.
    """
    train, test, proxy = source.train, source.test, None
    rng = np.random.default_rng([seed, 3])
    if experiment.proxy.examples:
        rows = _sample_balanced(test.labels, experiment.proxy.examples, rng)
        proxy, test = test.rows(rows), test.rows(_others(len(test), rows))
    if experiment.data.examples is not None:
        train = train.rows(_sample(len(train), experiment.data.examples, "data.examples", rng))
    validation = None
    if experiment.evaluate.validation and not experiment.evaluate.clients:
        held = max(1, round(experiment.evaluate.validation * len(train)))
        rows = _sample(len(train), held, "evaluate.validation", np.random.default_rng([seed, 6]))
        kept = _others(len(train), rows)
        validation, train = train.rows(rows), train.rows(kept)
    target = experiment.target
    target_data = None
    if target.examples:
        if train.inputs.dtype != torch.float32:
            raise ValueError(f"target.examples needs float32 inputs, and these are {train.inputs.dtype}; convert them.")
        rows = _sample(len(train), target.examples, "target.examples", rng)
        target_data, train = _noisy(train.rows(rows), target.noise, seed), train.rows(_others(len(train), rows))
        test = _noisy(test, target.noise, seed + 1)
    names, population = experiment.partition.populate(train, np.random.default_rng([seed, 1]))
    tests = validations = None
    if experiment.evaluate.clients:
        share = experiment.evaluate.client_test
        population, tests = with_tests(population, names, test, share, np.random.default_rng([seed, 4]))
        if share := experiment.evaluate.validation:
            population, validations = split_off(population, share, np.random.default_rng([seed, 6]))
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
        tests = None if tests is None else tests.with_client(test)
    training = tuple(range(len(names)))
    new: tuple[int, ...] = ()
    if number := experiment.evaluate.new_clients:
        honest = [k for k in training if k not in hostile and names[k] != TARGET]
        if number >= len(honest):
            raise ValueError(f"evaluate.new_clients = {number} leaves none of {len(honest)} clients; use fewer.")
        new = tuple(sorted(np.random.default_rng([seed, 5]).choice(honest, number, replace=False).tolist()))
        training = tuple(k for k in training if k not in new)
    if pooled:
        names, population = [*names, POOLED], population.with_pool(training)
        training = (len(names) - 1,)
    labels = population.labels(source.classes)
    return Scenario(names, population, labels, test, proxy, hostile, tests, training, new, validation, validations)


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
