"""Choose the engine that trains a model's clients, and check once that it trains them as `serial` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from corymb.client.tasks.task import CLASSIFICATION, Task
from corymb.simulations.cores import can_fork
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.blocks import Trainer
from corymb.simulations.engine.client_layers import CLIENT_LAYERS
from corymb.simulations.engine.convolution import library_work
from corymb.simulations.engine.engine import Engine, InProcessEngine, MultiDeviceEngine
from corymb.simulations.engine.gram_products import UseGram
from corymb.simulations.engine.program import CPU, Program
from corymb.simulations.engine.trial import Candidate, prove, trial_population
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.workers import WorkerEngine
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
BATCH = 10  # examples, to choose the method of a convolution
MAX_LIBRARY_WORK = 3_000_000  # multiplications of an example; docs/decisions/convolutions.md
TrainerMaker = Callable[[Population, torch.device], Trainer]


def find_trainer(
    engine: str,
    model: Callable[[], nn.Module],
    store: Examples,
    device: torch.device = CPU,
    task: Task = CLASSIFICATION,
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
        if task.losses is None:
            raise ValueError("the loss of the task is no mean of one loss per example")
        if engine == "auto" and device == CPU and _is_faster_alone(model, store):
            raise ValueError("that is faster for a model with so large convolutions")
        return _proven(model, store, engine, device, task)
    except ValueError as error:
        if engine != "auto":
            raise ValueError(
                f"engine = {engine!r} cannot train this model: {error}. Use engine = 'serial' or 'auto'."
            ) from None
        log.warning("Clients train one by one because %s.", error)
        return None


def make_engine(
    engine: str,
    trainer: TrainerMaker,
    population: Population,
    layout: Layout,
    workers: int,
    device: torch.device = CPU,
    seed: int = 0,
) -> Engine:
    """Return the engine of the name `engine` for the clients of `population`.

    On a CPU, "processes" starts `workers` worker processes; "auto" does so if `workers` is above one. If `device` is
    "cuda" without a number, the engine uses all GPUs.
    """
    with torch.random.fork_rng(devices=[]):
        trainers = []
        for each in devices_like(device):
            torch.default_generator.manual_seed(seed)  # for parameters that are not trained, as the clients make them
            trainers.append(trainer(population, each))
    if can_fork() and device == CPU and (engine == "processes" or (engine == "auto" and workers > 1)):
        return WorkerEngine(trainers[0], layout, max(workers, 1))
    return InProcessEngine(trainers[0], layout) if len(trainers) == 1 else MultiDeviceEngine(trainers, layout)


def devices_like(device: torch.device) -> list[torch.device]:
    """Return all GPUs if `device` is "cuda" without a number, else only `device`."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _proven(
    model: Callable[[], nn.Module], store: Examples, engine: str, device: torch.device, task: Task
) -> TrainerMaker:
    """Return the fastest trainer whose results equal those of `serial` in a trial.

    Raises `ValueError` with the reason against each candidate if none passes, or if a client layer of the user's own
    fails and the engine is not "auto".
    """
    population, low_rank = trial_population(store), engine != "batched"
    plain = partial(_program, low_rank, UseGram.NEVER)
    # Each candidate as it is tried and as it is used: the trial forces GramWeights, which are optional later.
    candidates: list[tuple[Candidate, Candidate]] = [(plain, plain)]
    if device == CPU:
        candidates.append((_vmapped, _vmapped))
        if low_rank:  # not on a GPU: GramWeights loop over the clients
            candidates.insert(0, (partial(_program, True, UseGram.ALWAYS), partial(_program, True, UseGram.IF_CHEAPER)))
    reasons: list[str] = []
    with torch.random.fork_rng(devices=[]):
        for trial, final in candidates:
            if trial is _vmapped and (own := _own_client_layers(model())):
                problem = f"the client layer of {', '.join(own)} fails: {'; '.join(dict.fromkeys(reasons))}"
                if engine != "auto":
                    raise ValueError(problem)
                log.warning("Clients are trained with torch.func, because %s.", problem)
            try:
                prove(trial, model, population, device, task)
                return partial(_made, final, model, task)
            except ValueError as error:
                reasons.append(f"{'with torch.func, ' if trial is _vmapped else ''}{error}")
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def _made(
    candidate: Candidate, model: Callable[[], nn.Module], task: Task, population: Population, device: torch.device
) -> Trainer:
    return candidate(model, population, device, task)


def _is_faster_alone(model: Callable[[], nn.Module], store: Examples) -> bool:
    """Return whether most of the time goes into convolutions that blocks compute client by client, too."""
    with torch.random.fork_rng(devices=[]):
        module = model().eval()
        return library_work(module, store.inputs_at(torch.arange(BATCH) % len(store))) > MAX_LIBRARY_WORK


def _own_client_layers(module: nn.Module) -> list[str]:
    """Return the names of the layers of `module` for which a user, not Corymb, has registered a client layer."""
    kinds = {type(layer) for layer in module.modules()}
    return sorted(kind.__name__ for kind in kinds if not _is_ours(CLIENT_LAYERS.get(kind)))


def _is_ours(client_layer: type | None) -> bool:
    return client_layer is None or client_layer.__module__.startswith("corymb.simulations.")


def _program(
    low_rank: bool, use_gram: UseGram, model: Callable[[], nn.Module], population: Population, device: torch.device,
    task: Task,
) -> Trainer:  # fmt: skip
    return Program(model(), population, low_rank, use_gram, device, task)


def _vmapped(model: Callable[[], nn.Module], population: Population, device: torch.device, task: Task) -> Trainer:
    return Vmapped(model(), population, task)
