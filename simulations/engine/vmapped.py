"""Train a block with `torch.func.vmap`: any module with parameters that draws no random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from corymb.client import TrainSettings
from corymb.client.tasks.task import CLASSIFICATION, Task
from corymb.simulations.data.population import Population
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.block_result import BlockResult, SeenSteps
from corymb.simulations.engine.optimizer import Optimizer
from corymb.simulations.engine.tracing import random_states
from corymb.simulations.engine.weight_forms import DenseWeights

Tensors = dict[str, Tensor]


class Vmapped:
    """Trains blocks of clients as `Program` does, for modules with layers that `Program` does not support.

    Raises `ValueError`, which names the layer, for random numbers, recurrence, buffers and shared parameters, and for
    code that mixes the examples of a batch, because a batch may hold padding.
    """

    def __init__(self, module: nn.Module, population: Population, task: Task = CLASSIFICATION) -> None:
        self._task = task
        self._module, self.population, self.device = module, population, torch.device("cpu")
        for name, inner in module.named_modules():
            is_random = isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0
            if is_random or isinstance(inner, nn.RNNBase) or list(inner.buffers(recurse=False)):
                raise ValueError(f"the layer {name!r} is a {type(inner).__name__}")
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if shared := parameters.keys() - dict(module.named_parameters()).keys():
            raise ValueError(f"two layers of the model share the parameter {min(shared)!r}")
        if _mixes_examples(module.train(), _inputs_like(population)):
            raise ValueError("the model's code mixes the examples of a batch")

    def first_layer(self, settings: TrainSettings) -> str | None:
        """See `Trainer.first_layer`."""
        return None

    def train(
        self,
        start: Tensors,
        clients: Sequence[int],
        settings: TrainSettings,
        server_round: int,
        own_starts: bool = False,
        offsets: Mapping[str, Any] | None = None,
    ) -> BlockResult:
        """See `Program.train`."""
        store = self.population.store
        sizes = [self.population.size(client) for client in clients]
        seed_keys = [(settings.seed, client, server_round) for client in clients]
        batches = Batches.draw(sizes, settings, seed_keys, next(iter(start.values())).dtype)
        parameters = {name: DenseWeights(tensor, len(clients), own_starts) for name, tensor in start.items()}
        trained = {name: parameter.weight for name, parameter in parameters.items()}
        fixed = {name: p.detach() for name, p in self._module.named_parameters() if not p.requires_grad}
        trainable = [pair for name in trained for pair in parameters[name].trainable()]
        added = None if offsets is None else [offsets[name] for name in trained]
        optimizer = Optimizer(trainable, settings, settings.rate(server_round), added)
        task_losses = self._task.losses
        assert task_losses is not None

        def loss(
            weights: Tensors, others: Tensors, inputs: Tensor, targets: Tensor, example_weights: Tensor
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            outputs = functional_call(self._module, {**weights, **others}, (inputs,))
            each = task_losses(outputs, targets)
            return (each * example_weights).sum(), (each, outputs)

        gradients_of = vmap(grad(loss, has_aux=True), in_dims=(0, None, 0, 0, 0))
        positions = self.population.store_positions(clients, batches.rows)  # in the store, [K, S, B]
        seen = SeenSteps(*positions.shape[::2])
        self._module.train()
        for step in range(positions.shape[1]):
            inputs, targets = store.inputs_at(positions[:, step]), store.targets[positions[:, step]]
            with sdpa_kernel(SDPBackend.MATH):  # vmap would run the other kernels client by client
                gradients, (losses, outputs) = gradients_of(trained, fixed, inputs, targets, batches.weights[:, step])
            for name, tensor in trained.items():
                tensor.grad = gradients[name]
            optimizer.step(step, batches.steps)
            hits = self._task.hits(outputs.detach().flatten(0, 1), targets.flatten(0, 1))
            seen.add(losses.detach().flatten(), hits)
        return BlockResult.of(list(parameters.values()), seen.seen(), batches, {})


def _inputs_like(population: Population) -> Tensor:
    """Return five inputs of noise, or real ones if those are integers, for which noise may mean nothing."""
    inputs = population.store.inputs_at(torch.arange(5) % len(population.store))
    if not inputs.is_floating_point():
        return inputs
    return torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs.dtype)


@torch.no_grad()
def _mixes_examples(module: nn.Module, inputs: Tensor) -> bool:
    """Return whether the output for one of five `inputs` depends, if only in one bit, on the others of its batch.

    The parameters are noise, because some may be zero at the start. Raises `ValueError` if the module fails on them or
    draws random numbers.
    """
    generator = torch.Generator().manual_seed(1)
    before, example, after, *others = inputs
    batches = (before, example, after), (others[0], example, others[1])
    noise = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in module.named_parameters()}
    states = random_states()
    try:
        first, second = (functional_call(module, noise, (torch.stack(batch),))[1] for batch in batches)
    except Exception as error:  # the model's own code runs here
        raise ValueError(f"the model fails on noise ({type(error).__name__}: {error})") from error
    if random_states() != states:
        raise ValueError("the model's code draws random numbers")
    return not torch.equal(first, second)
