"""Which engine trains an experiment's clients, and the proof that it trains them as `serial` does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import seed_of
from corymb.client.batches import training_batches
from corymb.simulations.data import Examples
from corymb.simulations.engine.engine import Engine, InProcess, OnDevices, Trainer
from corymb.simulations.engine.program import CPU, Program, Static
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.workers import Workers, can_fork
from corymb.simulations.population import Population
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
TRIED = [
    TrainSettings(learning_rate=0.01, batch_size=2, epochs=2, shuffle=False, optimizer_options=options)
    for options in ({}, {"momentum": 0.9, "weight_decay": 0.1})
]


def make_engine(
    name: str,
    model: Callable[[], nn.Module],
    population: Population,
    layout: Layout,
    workers: int,
    device: torch.device = CPU,
) -> Engine | None:
    """The engine called `name`; None where there is none. On a CPU it has `workers` processes where more than one is
    worth while; it has all GPUs if `device` is "cuda" without a number.

    "batched" writes every client's model out, "factored" keeps linear layers in factors where that costs less. "auto"
    takes the fastest that can train the model, and says in one line why where that is "serial".

    Raises `ValueError` where a model cannot be trained by the engine that was asked for.
    """
    if name in ("serial", "ray"):
        return None
    try:
        trainers = [make_trainer(model, population, name != "batched", each) for each in devices_like(device)]
    except ValueError as error:
        if name != "auto":
            raise ValueError(f"engine = {name!r} cannot train this model: {error}; use 'serial' or 'auto'.") from None
        log.warning("Clients are trained one after another, as %s.", error)
        return None
    if can_fork() and device == CPU and (name == "processes" or (name == "auto" and workers > 1)):
        return Workers(trainers[0], layout, max(workers, 1))
    return InProcess(trainers[0], layout) if len(trainers) == 1 else OnDevices(trainers, layout)


def devices_like(device: torch.device) -> list[torch.device]:
    """All devices of a kind where no number is given, as in "cuda"."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def make_trainer(
    model: Callable[[], nn.Module], population: Population, factored: bool, device: torch.device = CPU
) -> Trainer:
    """What trains blocks of clients. Raises `ValueError` with the reasons for a module that cannot be trained so."""
    few = _few(population.store)
    makers: list[tuple[Callable[[], Trainer], Callable[[], Trainer]]] = [  # for the trial, and for good
        (
            lambda: Program(model(), few, factored, device=device),
            lambda: Program(model(), population, factored, device=device),
        )
    ]
    if device == CPU:
        makers.append((lambda: Vmapped(model(), few), lambda: Vmapped(model(), population)))
        if factored:  # not on a GPU: products for one client after another, which no recording could hold
            makers.insert(
                0,
                (
                    lambda: Program(model(), few, factored, Static.ALWAYS),
                    lambda: Program(model(), population, factored, Static.CHEAPEST),
                ),
            )
    reasons = []
    with torch.random.fork_rng(devices=[]):
        for trial, final in makers:
            try:
                _prove(trial(), model(), few)
                return final()
            except ValueError as error:
                reasons.append(str(error))
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def _few(store: Examples) -> Population:
    """Clients with five and two examples, noise of several sizes: real ones may be too much alike, or no numbers."""
    shape = tuple(store.inputs_at(slice(0, 1)).shape[1:])
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.1, 1.0, 10.0, 0.1, 1.0, 10.0, 1.0]).view(7, *[1] * len(shape))
    targets = store.targets[torch.arange(7) * (len(store) // 7) % len(store)]
    return Population(Examples(sizes * torch.randn(7, *shape, generator=generator), targets), np.array([0, 5, 7]))


def _prove(trainer: Trainer, module: nn.Module, few: Population) -> None:
    """Train a few clients in both ways. Raises `ValueError` where the results differ.

    Which layers may mix the examples of a batch is known before; this is for what nobody thought of.
    """
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in module.parameters()):
        raise ValueError("its parameters have hooks")
    start = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    before = torch.cat([tensor.flatten() for tensor in start.values()])
    for how in TRIED:
        expected, losses = [], []
        try:
            for client in range(len(few)):
                nn.utils.vector_to_parameters(before.clone(), module.parameters())
                torch.default_generator.manual_seed(seed_of(how.seed, client, 1))
                batches = training_batches(TensorDataset(*few.examples(client)), how, torch.Generator())
                losses.append(train(module, batches, how)["loss"])
                expected.append(nn.utils.parameters_to_vector(module.parameters()).detach())
                if any(parameter.requires_grad and parameter.grad is None for parameter in module.parameters()):
                    raise ValueError("it has parameters that it does not use")
            times = 3 if trainer.device.type == "cuda" else 1  # the third from a recording
            trained = [trainer.train(start, range(len(few)), how, 1) for _ in range(times)]
            found = [each.models() for each in trained]
        except ValueError:
            raise
        except Exception as error:  # its own code runs here
            raise ValueError(f"a trial with two clients failed ({type(error).__name__}: {error})") from error
        for report in (each.report for each in trained):
            if not np.allclose(np.divide(report.losses, report.examples), losses, rtol=1e-3):
                raise ValueError("trained with others, a client does not tell the loss that it tells by itself")
        wrong = (torch.stack(found) - torch.stack(expected)).flatten(1).norm(dim=1).max()
        if not wrong <= 1e-3 * (torch.stack(expected) - before).norm() + 1e-6 * before.norm():
            raise ValueError("trained with others, a client does not learn what it learns by itself")
