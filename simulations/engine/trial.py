"""The trial of a trainer: it must train two clients as they train alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import has_batch_norm, make_seeded
from corymb.client.batches import training_batches
from corymb.client.seeds import derive_seed
from corymb.client.tasks.task import Task
from corymb.protocol.shared_state import fixed_names
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.blocks import Trainer

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"momentum": 0.9, "weight_decay": 0.1})  # of SGD
Candidate = Callable[[Callable[[], nn.Module], Population, torch.device, Task], Trainer]


def trial_population(store: Examples) -> Population:
    """Return two clients with five and three examples of noise at several scales, or real ones if those are integers.

    The real examples may be too much alike for a trial, or not finite.
    """
    rows = torch.arange(8) * (len(store) // 8) % len(store)
    inputs = store.inputs_at(rows)
    if inputs.is_floating_point():
        scales = torch.tensor([0.1, 1.0, 10.0, 0.1, 1.0, 10.0, 1.0, 0.3]).view(8, *[1] * (inputs.dim() - 1))
        inputs = scales * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    strata = None if store.strata is None else store.strata[rows]
    return Population(Examples(inputs, store.targets[rows], strata=strata), np.array([0, 5, 8]))


def prove(
    candidate: Candidate, model: Callable[[], nn.Module], population: Population, device: torch.device, task: Task
) -> None:
    """Train the clients of `population` with `candidate` and one by one. Raises `ValueError` if the results differ.

    Tracing has already rejected layers that are known to mix the examples of a batch; the trial is for other cases. It
    runs in float64, because deep models magnify the rounding of float32, or in float32 if the model's code needs that.
    """

    model = partial(make_seeded, model, 0)  # parameters that are not trained are then equal
    made: list[nn.Module] = []

    def in_float64() -> nn.Module:
        made.append(model())
        return made[-1].double()

    store = population.store
    in_double = replace(population, store=replace(store, inputs=_in_double(store.inputs)))
    try:
        if any(t.is_floating_point() and t.dtype != torch.float32 for t in model().state_dict().values()):
            raise _Failed  # converting the model to float64 and back would change it
        trainer, module = candidate(in_float64, in_double, device, task), in_float64()
        return _compare(trainer, module, in_double, 1e-6, task)
    except _Failed:
        pass
    finally:  # in case `model` returns the same module again
        for module in made:
            module.float()
    try:
        _compare(candidate(model, population, device, task), model(), population, 1e-3, task)
    except _Failed as error:
        cause = error.__cause__
        said = str(cause).partition("\n")[0].partition(". ")[0][:200]
        raise ValueError(f"a trial with two clients failed ({type(cause).__name__}: {said})") from cause


def _trained(module: nn.Module) -> Tensor:
    """Return the parameters that are trained, as a vector."""
    return nn.utils.parameters_to_vector(p for p in module.parameters() if p.requires_grad)


class _Failed(Exception):
    """The trial raised the exception that is this one's cause."""


def _in_double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def _compare(trainer: Trainer, module: nn.Module, population: Population, tolerance: float, task: Task) -> None:
    """Raise `ValueError` if `trainer` does not train clients as `module` trains alone, up to `tolerance`.

    Raises `_Failed` if the model's code or the trainer raises an exception.
    """
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in module.parameters()):
        raise ValueError("the model's parameters have hooks")
    fixed = fixed_names(module)
    whole = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    start = {name: tensor for name, tensor in whole.items() if name not in fixed}
    before = _trained(module).detach().clone()
    for options in OPTIONS:
        settings = TrainSettings(
            learning_rate=0.01, batch_size=3, epochs=2, shuffle=False, optimizer_options=options
        )  # not when this module is imported: torch's first optimiser in a process takes seconds
        expected, losses, buffers = [], [], []
        try:
            for client in range(len(population)):
                module.load_state_dict(whole)
                torch.default_generator.manual_seed(derive_seed(settings.seed, client, 1))
                data = TensorDataset(*population.examples(client))
                batches = training_batches(data, settings, torch.Generator(), has_batch_norm(module))
                losses.append(train(module, batches, settings, task)["loss"])
                expected.append(_trained(module).detach())
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
