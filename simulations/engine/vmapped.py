"""Any module of parameters that does not draw random numbers, for a block of clients, by torch's own vectorisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from corymb.client import TrainSettings
from corymb.simulations.data.population import Population
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.block_result import BlockResult
from corymb.simulations.engine.optimizer import Optimizer
from corymb.simulations.engine.tracing import dice
from corymb.simulations.engine.weight_forms import DenseWeights

Tensors = dict[str, Tensor]


class Vmapped:
    """Trains blocks of clients as `Program` does, for modules whose layers that does not know.

    Raises `ValueError`, naming the layer, for randomness, recurrence, buffers and shared parameters, and for code
    that mixes the examples of a batch: a batch may be filled up.
    """

    def __init__(self, module: nn.Module, population: Population) -> None:
        self._module, self._population, self.device = module, population, torch.device("cpu")
        for name, inner in module.named_modules():
            random = isinstance(inner, (nn.modules.dropout._DropoutNd, nn.RNNBase))
            if random or list(inner.buffers(recurse=False)):
                raise ValueError(f"the layer {name!r} is a {type(inner).__name__}")
        every = dict(module.named_parameters(remove_duplicate=False))
        if shared := every.keys() - dict(module.named_parameters()).keys():
            raise ValueError(f"{min(shared)!r} is shared by two layers")
        example = population.store.inputs_at(slice(0, 1))
        if _mixes(module.train(), tuple(example.shape[1:]), example.dtype):
            raise ValueError("its code mixes the examples of a batch")

    def train(
        self, start: Tensors, clients: Sequence[int], settings: TrainSettings, server_round: int, own: bool = False
    ) -> BlockResult:
        """See `Program.train`."""
        store = self._population.store
        sizes = [self._population.size(client) for client in clients]
        sites = [(settings.seed, client, server_round) for client in clients]
        batches = Batches.drawn(sizes, settings, sites, next(iter(start.values())).dtype)
        pieces = {name: DenseWeights(tensor, len(clients), own) for name, tensor in start.items()}
        learns = {name for name, parameter in self._module.named_parameters() if parameter.requires_grad}
        moving = {name: piece.weight for name, piece in pieces.items() if name in learns}
        fixed = {name: piece.weight for name, piece in pieces.items() if name not in learns}
        coordinates = [pair for name in moving for pair in pieces[name].coordinates()]
        optimizer = Optimizer(coordinates, settings, settings.rate(server_round))

        def loss(
            weights: Tensors, others: Tensors, inputs: Tensor, targets: Tensor, shares: Tensor
        ) -> tuple[Tensor, Tensor]:
            given = functional_call(self._module, {**weights, **others}, (inputs,))
            return (nn.functional.cross_entropy(given, targets, reduction="none") * shares).sum(), given

        slopes = vmap(grad(loss, has_aux=True))
        places = self._population.places(clients, batches.rows)
        scores = []
        self._module.train()
        for step in range(places.shape[1]):
            inputs, targets = store.inputs_at(places[:, step]), store.targets[places[:, step]]
            gradients, given = slopes(moving, fixed, inputs, targets, batches.weights[:, step])
            for name, tensor in moving.items():
                tensor.grad = gradients[name]
            optimizer.step([client for client, steps in enumerate(batches.steps) if steps <= step])
            scores.append(given.detach().flatten(0, 1))
        targets = store.targets[places].transpose(0, 1)
        return BlockResult.of(list(pieces.values()), torch.stack(scores), targets, batches)


@torch.no_grad()
def _mixes(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether what it gives for an example depends on those before and after, by a bit.

    Parameters are noise, too: at the start some may be zero.
    """
    drawn = torch.Generator().manual_seed(0)
    before, example, after, *others = torch.randn(5, *shape, generator=drawn).to(dtype)
    batches = (before, example, after), (others[0], example, others[1])
    noise = {name: torch.randn(p.shape, generator=drawn).to(p.dtype) for name, p in module.named_parameters()}
    generators = dice()
    try:
        alone, again = (functional_call(module, noise, (torch.stack(batch),))[1] for batch in batches)
    except Exception as error:  # its own code runs here
        raise ValueError(f"it fails on noise ({type(error).__name__}: {error})") from error
    if dice() != generators:
        raise ValueError("its code draws random numbers")
    return not torch.equal(alone, again)
