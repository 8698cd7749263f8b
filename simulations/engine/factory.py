"""Which engine trains a model's clients, and the proof, made once, that it trains them as `serial` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import seed_of
from corymb.client.batches import training_batches
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.engine import Engine, InProcess, OnDevices, Trainer
from corymb.simulations.engine.program import CPU, Program, Static
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.workers import Workers, can_fork
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
TRIED = [
    TrainSettings(learning_rate=0.01, batch_size=2, epochs=2, shuffle=False, optimizer_options=options)
    for options in ({}, {"momentum": 0.9, "weight_decay": 0.1})
]


TrainerMaker = Callable[[Population, torch.device], Trainer]


def find_trainer(
    engine: str, model: Callable[[], nn.Module], store: Examples, device: torch.device = CPU
) -> TrainerMaker | None:
    """What makes the trainer of any population for the `engine` of that name, once it has been proven; None for none.

    "batched" writes every client's model out, "low_rank" keeps linear layers as low-rank updates where that costs less.
    "auto" takes the fastest that can train the model, and logs in one line why where that is "serial". `store` has
    examples like those that will be trained on.

    Raises `ValueError` where a model cannot be trained by the engine that was asked for.
    """
    if engine in ("serial", "ray"):
        return None
    try:
        return _proven(model, store, engine != "batched", device)
    except ValueError as error:
        if engine != "auto":
            raise ValueError(f"engine = {engine!r} cannot train this model: {error}; use 'serial' or 'auto'.") from None
        log.warning("Clients are trained one after another, as %s.", error)
        return None


def make_engine(
    engine: str,
    trainer: TrainerMaker,
    population: Population,
    layout: Layout,
    workers: int,
    device: torch.device = CPU,
) -> Engine:
    """The `engine` of that name for the clients of `population`.

    On a CPU it has `workers` processes where more than one is worth while; it has all GPUs if `device` is "cuda"
    without a number.
    """
    with torch.random.fork_rng(devices=[]):
        trainers = [trainer(population, each) for each in devices_like(device)]
    if can_fork() and device == CPU and (engine == "processes" or (engine == "auto" and workers > 1)):
        return Workers(trainers[0], layout, max(workers, 1))
    return InProcess(trainers[0], layout) if len(trainers) == 1 else OnDevices(trainers, layout)


def devices_like(device: torch.device) -> list[torch.device]:
    """All devices of a kind where no number is given, as in "cuda"."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _proven(model: Callable[[], nn.Module], store: Examples, low_rank: bool, device: torch.device) -> TrainerMaker:
    """The fastest way of training that gives what `serial` gives. Raises `ValueError` with the reasons against each."""
    few = _few(store)
    # Each way as it is tried, and as it is used: a first layer stands on its examples only where that costs less.
    ways: list[tuple[TrainerMaker, TrainerMaker]] = [
        (partial(_program, model, low_rank, Static.NEVER), partial(_program, model, low_rank, Static.NEVER))
    ]
    if device == CPU:
        ways.append((partial(_vmapped, model), partial(_vmapped, model)))
        if low_rank:  # not on a GPU: products for one client after another, which no recording could hold
            ways.insert(
                0, (partial(_program, model, True, Static.ALWAYS), partial(_program, model, True, Static.CHEAPEST))
            )
    reasons = []
    with torch.random.fork_rng(devices=[]):
        for trial, final in ways:
            try:
                _prove(trial(few, device), model(), few)
                return final
            except ValueError as error:
                reasons.append(str(error))
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def _program(
    model: Callable[[], nn.Module], low_rank: bool, static: Static, population: Population, device: torch.device
) -> Trainer:
    return Program(model(), population, low_rank, static, device)


def _vmapped(model: Callable[[], nn.Module], population: Population, device: torch.device) -> Trainer:
    return Vmapped(model(), population)


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
