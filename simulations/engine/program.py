"""Train a block of clients at once, with a module whose layers hold one set of weights per client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.client.app import has_batch_norm
from corymb.client.seeds import derive_seed
from corymb.client.tasks.task import CLASSIFICATION, Task
from corymb.simulations.data.population import Population
from corymb.simulations.engine.backprop import make_backprop, reader_of_examples
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.block_result import BlockResult, Seen, SeenSteps, stack_steps
from corymb.simulations.engine.client_layers import parameter_of, to_client_layers
from corymb.simulations.engine.dropout import ClientDropout
from corymb.simulations.engine.gram_products import GramMatrices, UseGram
from corymb.simulations.engine.gram_weights import GramOffset, GramWeights
from corymb.simulations.engine.layers import Block, StepContext
from corymb.simulations.engine.linear import ClientLinear, rows_per_example
from corymb.simulations.engine.optimizer import Optimizer, PlainSGD
from corymb.simulations.engine.weight_forms import BlockParameter, as_dtype, first_rows

State = Mapping[str, Tensor]
Offsets = Mapping[str, Tensor | GramOffset]
CPU = torch.device("cpu")


class Program:
    """Trains blocks of clients of `population` for `task`, each client as `client.train` trains it alone.

    `low_rank` says whether linear layers may store low-rank weights. `use_gram` says when the first layer stores
    `GramWeights`, for which the examples have to be on the CPU. All work runs on `device`, which also keeps the
    examples unless they are memory-mapped. Raises `ValueError` for a module that is not supported; the message names
    the layer.
    """

    def __init__(
        self,
        module: nn.Module,
        population: Population,
        low_rank: bool = True,
        use_gram: UseGram = UseGram.NEVER,
        device: torch.device = CPU,
        task: Task = CLASSIFICATION,
    ) -> None:
        population = replace(population, store=population.store.to(device))
        self.population, self._low_rank, self.device = population, low_rank, device
        self._task = task
        self._context = StepContext(use_patches=device.type != "cpu")
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        graph_module, self._layers = to_client_layers(module, self._context)
        for name, rows in rows_per_example(module, population.store.inputs_at(slice(0, 1)).cpu()).items():
            if isinstance(layer := self._layers.get(name), ClientLinear):
                layer.rows = rows
        self._no_single = has_batch_norm(module)
        self._has_dropout = any(isinstance(layer, ClientDropout) for layer in self._layers.values())
        self._needs_lengths = any(layer.needs_lengths for layer in self._layers.values())
        self._backprop = make_backprop(graph_module.to(device))
        first = reader_of_examples(graph_module)
        may_use_gram = isinstance(first, ClientLinear) and use_gram is not UseGram.NEVER
        self._gram_layer = first if isinstance(first, ClientLinear) and may_use_gram else None
        if self._gram_layer is not None:
            self._gram_layer.gram = GramMatrices(population, use_gram)

    def first_layer(self, settings: TrainSettings) -> str | None:
        """See `Trainer.first_layer`."""
        first = self._gram_layer
        is_short = first is not None and first.keeps_factors(settings)
        return next(name for name, layer in self._layers.items() if layer is first) if is_short else None

    def train(
        self,
        start: State,
        clients: Sequence[int],
        settings: TrainSettings,
        server_round: int,
        own_starts: bool = False,
        offsets: Offsets | None = None,
    ) -> BlockResult:
        """Train `clients`, sorted by size with the largest first, on the batches that each draws for the round.

        All start from the parameters and buffers `start`, or, with `own_starts`, each from its own:
        `{name: [K, ...]}`. `offsets {name: [K, ...]}` are added to the gradients in each step; for the weight of the
        `first_layer`, which stands for its bias too, a `GramOffset` is possible.
        """
        # Inference mode is faster, but it does not allow autograd.
        needs_autograd = self._backprop.needs_autograd or not self._is_classification
        with torch.no_grad() if needs_autograd else torch.inference_mode():
            return self._train(start, clients, settings, server_round, own_starts, offsets)

    def _train(
        self, start: State, clients: Sequence[int], settings: TrainSettings, server_round: int, own_starts: bool,
        offsets: Offsets | None,
    ) -> BlockResult:  # fmt: skip
        context, store, device = self._context, self.population.store, self.device
        start = {name: tensor.to(device) for name, tensor in start.items()}
        seed_keys = [(settings.seed, client, server_round) for client in clients]
        sizes = [self.population.size(client) for client in clients]
        dtype = start[self._names[0]].dtype
        batches = Batches.draw(sizes, settings, seed_keys, dtype, self._no_single)
        # Positions of the examples in the store, steps first: [S, K, B].
        positions = self.population.store_positions(clients, batches.rows).transpose(0, 1)
        positions, batches = positions.to(store.inputs.device), batches.to(device)
        context.clients = len(clients)
        context.generators = (
            [torch.Generator().manual_seed(derive_seed(*key)) for key in seed_keys] if self._has_dropout else []
        )
        context.precision = None if settings.precision == "float32" else getattr(torch, settings.precision)
        rate = settings.rate(server_round)
        context.rate = PlainSGD.gradient_rate(settings, rate)
        targets = store.targets[positions].to(device)

        over_examples = next((each for each in (offsets or {}).values() if isinstance(each, GramOffset)), None)
        low_rank, is_plain = self._low_rank and offsets is None, context.rate is not None
        block = Block(clients, batches, settings, own_starts, low_rank, is_plain, over_examples)
        for name, layer in self._layers.items():
            layer.start_block(_inside(name, start), block)
        added = None if offsets is None else self._added_by(offsets)
        trainable = self._trainable() if settings.proximal or added is not None or not is_plain else []
        optimizer = (PlainSGD if is_plain else Optimizer)(trainable, settings, rate, added)
        seen = self._take_steps(positions, targets, batches, optimizer, dtype)
        return BlockResult.of(self._parameters(), seen, batches, self._buffers())

    def _take_steps(
        self, positions: Tensor, targets: Tensor, batches: Batches, optimizer: Optimizer | PlainSGD, dtype: torch.dtype
    ) -> Seen:
        """Train on the examples at `positions [S, K, B]` of the store; return what was seen before each step."""
        if not self._is_classification:
            return self._take_general_steps(positions, targets, batches, optimizer)
        context, store = self._context, self.population.store
        _, clients, width = positions.shape
        by_step = [
            tensor.reshape(len(positions), -1, 1).unbind() for tensor in (targets, batches.weights.transpose(0, 1))
        ]
        example = store.inputs_at(slice(0, 1)).to(self.device)
        placeholder = example.new_zeros(1).expand(clients * width, *example.shape[1:])
        ignores_inputs = self._gram_layer is not None and isinstance(self._gram_layer.forms["weight"], GramWeights)
        logits: list[Tensor] = []
        minus_one = torch.full((clients * width, 1), -1.0, dtype=dtype, device=self.device)
        for step, (step_targets, example_weights) in enumerate(zip(*by_step, strict=True)):
            context.clients = active = optimizer.active(step, batches.steps)
            context.lengths = batches.lengths_at(step)[:active] if self._needs_lengths else []
            rows = active * width
            inputs = (
                first_rows(rows, placeholder)
                if ignores_inputs
                else store.inputs_at(positions[step, :active].flatten()).to(self.device)
            )
            outputs = self._backprop.forward(inputs)
            logits.append(as_dtype(outputs, dtype))
            # The gradient of cross-entropy: softmax minus one for the target.
            gradients = (
                logits[-1].softmax(dim=1).scatter_add_(1, first_rows(rows, step_targets), first_rows(rows, minus_one))
            )
            self._backprop.backward(as_dtype(gradients.mul_(first_rows(rows, example_weights)), outputs.dtype))
            optimizer.step(step, batches.steps)
        return Seen.of_logits(stack_steps(logits, clients * width), targets)

    @property
    def _is_classification(self) -> bool:
        """Return whether each example has one class, so that the gradient of the loss is known."""
        return self._task.losses is CLASSIFICATION.losses and self.population.store.targets.dim() == 1

    def _take_general_steps(
        self, positions: Tensor, targets: Tensor, batches: Batches, optimizer: Optimizer | PlainSGD
    ) -> Seen:
        """Do the work of `_take_steps` for any task, with the gradient of its loss by autograd."""
        context, store = self._context, self.population.store
        _, clients, width = positions.shape
        seen, task_losses = SeenSteps(clients, width), self._task.losses
        assert task_losses is not None
        for step in range(len(positions)):
            context.clients = active = optimizer.active(step, batches.steps)
            context.lengths = batches.lengths_at(step)[:active] if self._needs_lengths else []
            outputs = self._backprop.forward(store.inputs_at(positions[step, :active].flatten()).to(self.device))
            step_targets = targets[step, :active].flatten(0, 1)
            with torch.enable_grad():
                leaf = as_dtype(outputs, batches.weights.dtype).detach().requires_grad_()
                losses = task_losses(leaf, step_targets)
                (losses * batches.weights[:active, step].flatten()).sum().backward()
            assert leaf.grad is not None
            seen.add(losses.detach(), self._task.hits(outputs, step_targets))
            self._backprop.backward(as_dtype(leaf.grad, outputs.dtype))
            optimizer.step(step, batches.steps)
        return seen.seen()

    def _trainable(self) -> list[tuple[Tensor, Tensor]]:
        forms = [form for layer in self._layers.values() for form in layer.forms.values()]
        return [pair for form in forms for pair in form.trainable()]

    def _added_by(self, offsets: Offsets) -> list[Tensor]:
        """Return what `offsets` add to the gradients of the tensors of `_trainable`."""
        added = []
        for name, layer in self._layers.items():
            for kind, form in layer.forms.items():
                offset = offsets.get(parameter_of(name, kind))
                if isinstance(offset, GramOffset):
                    added += form.added(offset)
                elif offset is not None:
                    added.append(offset.to(self.device))
        return added

    def _parameters(self) -> list[BlockParameter]:
        """Return all parameters in the model's order."""
        parameters = {
            parameter_of(name, kind): form for name, layer in self._layers.items() for kind, form in layer.forms.items()
        }
        return [parameters[name] for name in self._names]

    def _buffers(self) -> dict[str, NDArray[Any]]:
        """Return the buffers at the K clients, `{name: [K, ...]}`."""
        return {
            parameter_of(name, kind): tensor.cpu().numpy()
            for name, layer in self._layers.items()
            for kind, tensor in layer.buffers_after().items()
        }


def _inside(layer: str, state: State) -> dict[str, Tensor]:
    """Return the part of `state` that belongs to a layer, by the names inside the layer."""
    prefix = parameter_of(layer, "")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
