"""One run of an experiment: one rule, one seed, from data to journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, evaluate, make_client_app
from corymb.client.batches import evaluation_batches
from corymb.client.device import choose_device
from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Journal, RoundRecord
from corymb.simulations.data import Source, load
from corymb.simulations.experiment import DataSettings, Experiment, ParticipationSettings, RuleSettings
from corymb.simulations.grid import LocalGrid, client_names
from corymb.simulations.models import make_model
from corymb.simulations.participation import (
    Always,
    Bernoulli,
    Cyclic,
    Markov,
    Participation,
    Trace,
    class_correlated,
)
from corymb.simulations.partition import by_site, dirichlet, iid, label_distributions, shards
from corymb.strategies import Layout

Parts = list[NDArray[np.int64]]


@dataclass(frozen=True)
class Population:
    """The clients of a seed: their names, their rows of the training data, their label distributions `[N, C]`."""

    names: list[str]
    parts: Parts
    labels: NDArray[np.float64]


@lru_cache(maxsize=2)
def source_of(settings: DataSettings) -> Source:
    """The data, read once for all runs of an experiment."""
    return load(settings.source, **settings.model_dump(exclude={"source"}))


def population_of(experiment: Experiment, seed: int) -> Population:
    """The clients of `seed`. Raises `ValueError` for more clients than examples, or sites where there are none."""
    train, settings = source_of(experiment.data).train, experiment.partition
    labels = train.targets.numpy()
    rng = np.random.default_rng([seed, 1])
    if settings.kind == "site":
        if train.sites is None:
            raise ValueError(
                f"The data {experiment.data.source!r} has no sites for partition.kind = 'site'; "
                "give a folder with one table per site, or another partition."
            )
        parts, names = by_site(train.sites)
    else:
        clients = settings.clients
        pieces = clients * settings.shards_per_client if settings.kind == "shards" else clients
        if pieces > len(labels):
            raise ValueError(
                f"partition.clients = {clients} needs {pieces} examples or more and there are {len(labels)}; "
                "take fewer clients."
            )
        if settings.kind == "iid":
            parts = iid(labels, clients, rng)
        elif settings.kind == "shards":
            parts = shards(labels, clients, rng, settings.shards_per_client)
        else:
            parts = dirichlet(labels, clients, rng, settings.alpha)
        names = client_names(clients)
    classes = source_of(experiment.data).classes
    return Population(names, parts, label_distributions(labels, parts, classes))


def participation_of(
    settings: ParticipationSettings, population: Population, seed: int
) -> tuple[Participation, NDArray[np.float64] | None]:
    """The process, and each client's probability of being online `[N]` where it has one."""
    clients = len(population.names)
    rng = np.random.default_rng([seed, 2])
    if settings.kind == "always":
        return Always(clients), None
    if settings.kind == "trace":
        return Trace(settings.path or Path(), clients), None
    if settings.probability is not None:
        probabilities = np.full(clients, settings.probability)
    else:
        probabilities = class_correlated(population.labels, rng, settings.alpha, settings.mean, settings.minimum)
    if settings.kind == "bernoulli":
        return Bernoulli(probabilities, rng), probabilities
    if settings.kind == "markov":
        return Markov(probabilities, rng, settings.rate), probabilities
    return Cyclic(probabilities, rng, settings.cycle), probabilities


def model_of(experiment: Experiment) -> nn.Module:
    """A new model for the experiment's data."""
    source = source_of(experiment.data)
    shape = tuple(source.train.inputs.shape[1:])
    return make_model(experiment.model.kind, shape, source.classes, **experiment.model.options)


def check(experiment: Experiment) -> None:
    """Raise `ValueError` for data, clients, participation, a model or a device that cannot be, before any run."""
    module = model_of(experiment).eval()
    try:
        with torch.no_grad():
            nn.functional.cross_entropy(module(source_of(experiment.data).test.inputs[:2]), torch.zeros(2).long())
    except Exception as error:
        raise ValueError(f"The model {experiment.model.kind!r} does not fit the data: {error}.") from error
    for rule in experiment.rules:
        choose_device(experiment.train_for(rule).device)
    for seed in experiment.seeds:
        participation_of(experiment.participation, population_of(experiment, seed), seed)


def run(
    experiment: Experiment,
    rule: RuleSettings,
    seed: int,
    folder: Path,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> None:
    """Run `rule` with `seed`; the journal in `folder` is its record.

    The data's partition, the participation and the initial model depend on the seed only, so that
    all rules meet the same. Test accuracy and loss are the server's metrics.
    """
    source = source_of(experiment.data)
    population = population_of(experiment, seed)
    participation, _ = participation_of(experiment.participation, population, seed)

    make = partial(model_of, experiment)
    datasets = [
        TensorDataset(source.train.inputs[rows], source.train.targets[rows])
        for rows in map(torch.from_numpy, population.parts)
    ]

    def data(context: Context) -> tuple[TensorDataset, None]:
        return datasets[int(context.node_config["partition-id"])], None

    def watch(record: RoundRecord) -> None:
        grid.require_answers()  # in the first round already, not after the last
        if on_round is not None:
            on_round(record)

    settings = experiment.train_for(rule).model_copy(update={"seed": seed})
    grid = LocalGrid(
        make_client_app(make, data),
        population.names,
        run_config=settings.flat(),
        participation=participation,
    )
    torch.manual_seed(seed)
    module = make()
    test = TensorDataset(source.test.inputs, source.test.targets)

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % experiment.evaluate.every and server_round != experiment.rounds:
            return None
        module.load_state_dict(to_state(arrays))
        metrics: dict[str, Any] = evaluate(module, evaluation_batches(test), TrainSettings())
        del metrics["seconds"]
        return MetricRecord(metrics)

    journal = Journal(folder, durable=False)
    strategy = FlowerStrategy(
        rule.make(),
        fraction_train=experiment.fraction,
        fraction_evaluate=0,
        min_available_nodes=1,
        seed=seed,
        journal=journal,
        on_round=watch,
        buffers=[entry.name for entry in Layout.of_module(module).buffers],
    )
    app = ServerApp()

    @app.main()
    def _main(grid: Grid, context: Context) -> None:
        initial = to_arrays({name: tensor.clone() for name, tensor in module.state_dict().items()})
        # Clients run while their replies are pulled: no clock may decide who counts.
        strategy.start(grid, initial, experiment.rounds, timeout=inf, evaluate_fn=evaluate_fn)

    try:
        app(grid=grid, context=grid.server_context())
    finally:
        journal.close()
