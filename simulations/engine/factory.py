"""Choose the engine that trains a model's clients, and check once that it trains them as `serial` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import derive_seed
from corymb.client.batches import training_batches
from corymb.simulations.cores import can_fork
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.engine import Engine, InProcessEngine, MultiDeviceEngine, Trainer
from corymb.simulations.engine.program import CPU, Program, UseGram
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.workers import WorkerEngine
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
TRIAL_SETTINGS = [
    TrainSettings(learning_rate=0.01, batch_size=2, epochs=2, shuffle=False, optimizer_options=options)
    for options in ({}, {"momentum": 0.9, "weight_decay": 0.1})
]


TrainerMaker = Callable[[Population, torch.device], Trainer]


def find_trainer(
    engine: str, model: Callable[[], nn.Module], store: Examples, device: torch.device = CPU
) -> TrainerMaker | None:
    """Return a function that makes the trainer for any population, or None if clients train one after another.

    `engine` is the engine's name in the experiment. "batched" stores every client's model in full. "low_rank" stores
    linear layers as low-rank updates where that costs less. "auto" takes the fastest that can train the model; if
    none can, it logs a warning and returns None. "serial" and "ray" return None. A trial checks the trainer first; it
    uses the targets and the input shape of `store`.

    Raises `ValueError` if the engine cannot train the model and is not "auto".
    """
    if engine in ("serial", "ray"):
        return None
    try:
        return _proven(model, store, engine != "batched", device)
    except ValueError as error:
        if engine != "auto":
            raise ValueError(
                f"engine = {engine!r} cannot train this model: {error}. Use engine = 'serial' or 'auto'."
            ) from None
        log.warning("Clients train one after another because %s.", error)
        return None


def make_engine(
    engine: str,
    trainer: TrainerMaker,
    population: Population,
    layout: Layout,
    workers: int,
    device: torch.device = CPU,
) -> Engine:
    """Return the engine of the name `engine` for the clients of `population`.

    On a CPU, "processes" starts `workers` worker processes; "auto" does so if `workers` is above one. If `device` is
    "cuda" without a number, the engine uses all GPUs.
    """
    with torch.random.fork_rng(devices=[]):
        trainers = [trainer(population, each) for each in devices_like(device)]
    if can_fork() and device == CPU and (engine == "processes" or (engine == "auto" and workers > 1)):
        return WorkerEngine(trainers[0], layout, max(workers, 1))
    return InProcessEngine(trainers[0], layout) if len(trainers) == 1 else MultiDeviceEngine(trainers, layout)


def devices_like(device: torch.device) -> list[torch.device]:
    """Return all GPUs if `device` is "cuda" without a number, else only `device`."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _proven(model: Callable[[], nn.Module], store: Examples, low_rank: bool, device: torch.device) -> TrainerMaker:
    """Return the fastest trainer whose results equal those of `serial` in a trial.

    Raises `ValueError` with the reason against each candidate if none passes.
    """
    population = _trial_population(store)
    # Each candidate as it is tried and as it is used: the trial forces GramWeights, which are optional later.
    candidates: list[tuple[TrainerMaker, TrainerMaker]] = [
        (partial(_program, model, low_rank, UseGram.NEVER), partial(_program, model, low_rank, UseGram.NEVER))
    ]
    if device == CPU:
        candidates.append((partial(_vmapped, model), partial(_vmapped, model)))
        if low_rank:  # not on a GPU: GramWeights loop over the clients, which a CUDA graph cannot capture
            candidates.insert(
                0, (partial(_program, model, True, UseGram.ALWAYS), partial(_program, model, True, UseGram.IF_CHEAPER))
            )
    reasons = []
    with torch.random.fork_rng(devices=[]):
        for trial, final in candidates:
            try:
                _prove(trial(population, device), model(), population)
                return final
            except ValueError as error:
                reasons.append(str(error))
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def _program(
    model: Callable[[], nn.Module], low_rank: bool, use_gram: UseGram, population: Population, device: torch.device
) -> Trainer:
    return Program(model(), population, low_rank, use_gram, device)


def _vmapped(model: Callable[[], nn.Module], population: Population, device: torch.device) -> Trainer:
    return Vmapped(model(), population)


def _trial_population(store: Examples) -> Population:
    """Return two clients with five and two examples of noise at several scales.

    The real examples may be too much alike for a trial, or not finite.
    """
    shape = tuple(store.inputs_at(slice(0, 1)).shape[1:])
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 10.0, 0.1, 1.0, 10.0, 1.0]).view(7, *[1] * len(shape))
    targets = store.targets[torch.arange(7) * (len(store) // 7) % len(store)]
    return Population(Examples(scales * torch.randn(7, *shape, generator=generator), targets), np.array([0, 5, 7]))


def _prove(trainer: Trainer, module: nn.Module, population: Population) -> None:
    """Train the clients of `population` with `trainer` and one by one. Raises `ValueError` if the results differ.

    Tracing has already rejected layers that are known to mix the examples of a batch; the trial is for other cases.
    """
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in module.parameters()):
        raise ValueError("the model's parameters have hooks")
    start = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    before = torch.cat([tensor.flatten() for tensor in start.values()])
    for settings in TRIAL_SETTINGS:
        expected, losses = [], []
        try:
            for client in range(len(population)):
                nn.utils.vector_to_parameters(before.clone(), module.parameters())
                torch.default_generator.manual_seed(derive_seed(settings.seed, client, 1))
                batches = training_batches(TensorDataset(*population.examples(client)), settings, torch.Generator())
                losses.append(train(module, batches, settings)["loss"])
                expected.append(nn.utils.parameters_to_vector(module.parameters()).detach())
                if any(parameter.requires_grad and parameter.grad is None for parameter in module.parameters()):
                    raise ValueError("the model has parameters that it does not use")
            repeats = 3 if trainer.device.type == "cuda" else 1  # the third runs from a CUDA graph
            results = [trainer.train(start, range(len(population)), settings, 1) for _ in range(repeats)]
            models = [result.models() for result in results]
        except ValueError:
            raise
        except Exception as error:  # the model's own code runs here
            raise ValueError(f"a trial with two clients failed ({type(error).__name__}: {error})") from error
        for report in (result.report for result in results):
            if not np.allclose(np.divide(report.losses, report.examples), losses, rtol=1e-3):
                raise ValueError("a client's loss in a block differs from its loss when it trains alone")
        difference = (torch.stack(models) - torch.stack(expected)).flatten(1).norm(dim=1).max()
        if not difference <= 1e-3 * (torch.stack(expected) - before).norm() + 1e-6 * before.norm():
            raise ValueError("a client's model from a block differs from its model when it trains alone")
