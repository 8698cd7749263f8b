"""Choose the engine that trains a model's clients, and check once that it trains them as `serial` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import derive_seed
from corymb.client.batches import training_batches
from corymb.simulations.cores import can_fork
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.client_layers import CLIENT_LAYERS
from corymb.simulations.engine.engine import Engine, InProcessEngine, MultiDeviceEngine, Trainer
from corymb.simulations.engine.gram_products import UseGram
from corymb.simulations.engine.program import CPU, Program
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.workers import WorkerEngine
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
TRIAL_SETTINGS = [
    TrainSettings(learning_rate=0.01, batch_size=3, epochs=2, shuffle=False, optimizer_options=options)
    for options in ({}, {"momentum": 0.9, "weight_decay": 0.1})
]


TrainerMaker = Callable[[Population, torch.device], Trainer]
Candidate = Callable[[Callable[[], nn.Module], Population, torch.device], Trainer]


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
        return _proven(model, store, engine, device)
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


def _proven(model: Callable[[], nn.Module], store: Examples, engine: str, device: torch.device) -> TrainerMaker:
    """Return the fastest trainer whose results equal those of `serial` in a trial.

    Raises `ValueError` with the reason against each candidate if none passes, or if a client layer of the user's own
    fails and the engine is not "auto".
    """
    population, low_rank = _trial_population(store), engine != "batched"
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
                _prove(trial, model, population, device)
                return partial(final, model)
            except ValueError as error:
                reasons.append(f"{'with torch.func, ' if trial is _vmapped else ''}{error}")
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def _own_client_layers(module: nn.Module) -> list[str]:
    """Return the names of the layers of `module` for which a user, not Corymb, has registered a client layer."""
    kinds = {type(layer) for layer in module.modules()}
    return sorted(kind.__name__ for kind in kinds if not _is_ours(CLIENT_LAYERS.get(kind)))


def _is_ours(client_layer: type | None) -> bool:
    return client_layer is None or client_layer.__module__.startswith("corymb.simulations.")


def _program(
    low_rank: bool, use_gram: UseGram, model: Callable[[], nn.Module], population: Population, device: torch.device
) -> Trainer:
    return Program(model(), population, low_rank, use_gram, device)


def _vmapped(model: Callable[[], nn.Module], population: Population, device: torch.device) -> Trainer:
    return Vmapped(model(), population)


def _trial_population(store: Examples) -> Population:
    """Return two clients with five and three examples of noise at several scales, or real ones if those are integers.

    The real examples may be too much alike for a trial, or not finite.
    """
    rows = torch.arange(8) * (len(store) // 8) % len(store)
    inputs = store.inputs_at(rows)
    if inputs.is_floating_point():
        scales = torch.tensor([0.1, 1.0, 10.0, 0.1, 1.0, 10.0, 1.0, 0.3]).view(8, *[1] * (inputs.dim() - 1))
        inputs = scales * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    return Population(Examples(inputs, store.targets[rows]), np.array([0, 5, 8]))


def _prove(candidate: Candidate, model: Callable[[], nn.Module], population: Population, device: torch.device) -> None:
    """Train the clients of `population` with `candidate` and one by one. Raises `ValueError` if the results differ.

    Tracing has already rejected layers that are known to mix the examples of a batch; the trial is for other cases. It
    runs in float64, because deep models magnify the rounding of float32, or in float32 if the model's code needs that.
    """

    made: list[nn.Module] = []

    def in_float64() -> nn.Module:
        made.append(model())
        return made[-1].double()

    store = population.store
    in_double = replace(population, store=replace(store, inputs=_in_double(store.inputs)))
    try:
        if any(t.is_floating_point() and t.dtype != torch.float32 for t in model().state_dict().values()):
            raise _Failed  # converting the model to float64 and back would change it
        trainer, module = candidate(in_float64, in_double, device), in_float64()
        return _compare(trainer, module, in_double, 1e-6)
    except _Failed:
        pass
    finally:  # in case `model` returns the same module again
        for module in made:
            module.float()
    try:
        _compare(candidate(model, population, device), model(), population, 1e-3)
    except _Failed as error:
        cause = error.__cause__
        said = str(cause).partition("\n")[0].partition(". ")[0][:200]
        raise ValueError(f"a trial with two clients failed ({type(cause).__name__}: {said})") from cause


class _Failed(Exception):
    """The trial raised the exception that is this one's cause."""


def _in_double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def _compare(trainer: Trainer, module: nn.Module, population: Population, tolerance: float) -> None:
    """Raise `ValueError` if `trainer` does not train clients as `module` trains alone, up to `tolerance`.

    Raises `_Failed` if the model's code or the trainer raises an exception.
    """
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in module.parameters()):
        raise ValueError("the model's parameters have hooks")
    start = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    for settings in TRIAL_SETTINGS:
        expected, losses, buffers = [], [], []
        try:
            for client in range(len(population)):
                module.load_state_dict(start)
                torch.default_generator.manual_seed(derive_seed(settings.seed, client, 1))
                batches = training_batches(TensorDataset(*population.examples(client)), settings, torch.Generator())
                losses.append(train(module, batches, settings)["loss"])
                expected.append(nn.utils.parameters_to_vector(module.parameters()).detach())
                buffers.append({name: buffer.clone() for name, buffer in module.named_buffers()})
                if any(parameter.requires_grad and parameter.grad is None for parameter in module.parameters()):
                    raise ValueError("the model has parameters that it does not use")
            result = trainer.train(start, range(len(population)), settings, 1)
            models, report = result.models(), result.report
        except ValueError:
            raise
        except Exception as error:  # the model's own code runs here
            raise _Failed from error
        if not np.allclose(np.divide(report.losses, report.examples), losses, rtol=tolerance):
            raise ValueError("a client's loss in a block differs from its loss when it trains alone")
        for client, alone in enumerate(buffers):
            together = {name: torch.from_numpy(values)[client] for name, values in report.buffers.items()}
            if together.keys() != alone.keys() or not all(
                torch.allclose(together[name], alone[name], rtol=tolerance, atol=tolerance) for name in alone
            ):
                raise ValueError("a client's buffers from a block differ from those when it trains alone")
        difference = (models - torch.stack(expected)).norm()
        if not difference <= tolerance * ((torch.stack(expected) - before).norm() + 1e-3 * before.norm()):
            raise ValueError("a client's model from a block differs from its model when it trains alone")
