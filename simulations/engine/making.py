"""Which engine trains an experiment's clients, and the proof that it trains them as `serial` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import seed_of
from corymb.client.batches import training_batches
from corymb.simulations.engine.engine import Engine, InProcess, Trainer
from corymb.simulations.engine.program import Program
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.workers import Workers
from corymb.simulations.population import Population
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
TRIED = TrainSettings(learning_rate=0.1, batch_size=2, epochs=2, shuffle=False)


def make_engine(
    name: str, model: Callable[[], nn.Module], population: Population, layout: Layout, workers: int
) -> Engine | None:
    """The engine called `name`, None for "serial"; with `workers` processes where more than one is worth while.

    "batched" writes every client's model out, "factored" keeps linear layers in factors where that costs less. "auto"
    takes the fastest that can train the model, and says in one line why where that is "serial".

    Raises `ValueError` where a model cannot be trained by the engine that was asked for.
    """
    if name == "serial":
        return None
    try:
        trainer = make_trainer(model, population, name != "batched")
    except ValueError as error:
        if name != "auto":
            raise ValueError(f"engine = {name!r} cannot train this model: {error}; use 'serial' or 'auto'.") from None
        log.warning("Clients are trained one after another, as %s.", error)
        return None
    if name == "processes" or (name == "auto" and workers > 1):
        return Workers(trainer, layout, max(workers, 1))
    return InProcess(trainer, layout)


def make_trainer(model: Callable[[], nn.Module], population: Population, factored: bool) -> Trainer:
    """What trains blocks of clients. Raises `ValueError` with the reason for a module that cannot be trained so."""
    reasons = []
    with torch.random.fork_rng(devices=[]):
        for make in (lambda: Program(model(), population, factored), lambda: Vmapped(model(), population)):
            try:
                trainer: Trainer = make()  # type: ignore[assignment]
                _prove(trainer, model(), population)
            except ValueError as error:
                reasons.append(str(error))
            else:
                return trainer
    raise ValueError(reasons[-1])


def _prove(trainer: Trainer, module: nn.Module, population: Population) -> None:
    """Train the first clients on a few examples in both ways. Raises `ValueError` where the results differ.

    A module's own code may mix the examples of a batch, or use its input twice; nobody can see that from outside.
    """
    few = population.first(clients=2, examples=3)
    start = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    expected = []
    try:
        for client in range(len(few)):
            mine = deepcopy(module)
            torch.default_generator.manual_seed(seed_of(TRIED.seed, client, 1))
            batches = training_batches(TensorDataset(*few.examples(client)), TRIED, torch.Generator())
            train(mine, batches, TRIED)
            expected.append(torch.cat([parameter.detach().flatten() for parameter in mine.parameters()]))
        found = trainer.tried(few, start, TRIED)
    except Exception as error:  # its own code runs here
        raise ValueError(f"a trial with two clients failed ({type(error).__name__}: {error})") from error
    for models in found:
        if not torch.allclose(models, torch.stack(expected), rtol=1e-3, atol=1e-5):
            raise ValueError("trained with others, a client does not learn what it learns by itself")
