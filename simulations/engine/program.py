"""Train a block of clients at once, with a module whose layers hold one set of weights per client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.client.app import derive_seed
from corymb.simulations.data.population import Population
from corymb.simulations.engine.backprop import feeds_one_client_layer, make_backprop
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.block_result import BlockResult, stack_steps
from corymb.simulations.engine.client_layers import parameter_of, to_client_layers
from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.cuda_graphs import CudaCapture, GraphRunner
from corymb.simulations.engine.gram_products import GramMatrices
from corymb.simulations.engine.gram_weights import GramWeights
from corymb.simulations.engine.layers import ClientDropout, ClientLinear, StepContext
from corymb.simulations.engine.low_rank import InputHistoryWeights, LowRankBias, LowRankWeights
from corymb.simulations.engine.optimizer import Optimizer, is_linear, is_plain
from corymb.simulations.engine.weight_forms import BlockParameter, DenseWeights, WeightForm, as_dtype, first_rows

State = Mapping[str, Tensor]
CPU = torch.device("cpu")
MAX_GRAPH_STEPS = 2000  # of a CUDA graph, which holds all operations of all steps in memory


class UseGram(Enum):
    """When the first layer stores its weights as `GramWeights`, over the examples of each client."""

    NEVER = "never"
    IF_CHEAPER = "if cheaper"
    ALWAYS = "always"


class Program:
    """Trains blocks of clients of `population` with cross-entropy, each client as `client.train` trains it alone.

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
    ) -> None:
        population = replace(population, store=population.store.to(device))
        self._population, self._low_rank, self._use_gram, self.device = population, low_rank, use_gram, device
        self._context = StepContext(use_patches=device.type != "cpu")
        self._names = [name for name, _ in module.named_parameters()]
        graph_module, self._layers = to_client_layers(module, self._context)
        self._has_dropout = any(isinstance(inner, ClientDropout) for inner in graph_module.modules())
        self._backprop = make_backprop(graph_module.to(device))
        self._gram_matrices = GramMatrices(population)
        first = next(iter(self._layers.values()), None)
        may_use_gram = (
            isinstance(first, ClientLinear) and feeds_one_client_layer(graph_module) and use_gram is not UseGram.NEVER
        )
        self._gram_layer = first if may_use_gram else None  # the one layer that reads the examples
        is_fixed = self._backprop.is_fixed and not population.store.is_mapped and not may_use_gram
        self.graphs = GraphRunner(CudaCapture(device)) if device.type == "cuda" and is_fixed else None

    def train(
        self,
        start: State,
        clients: Sequence[int],
        settings: TrainSettings,
        server_round: int,
        own_starts: bool = False,
    ) -> BlockResult:
        """Train `clients`, sorted by size with the largest first, on the batches that each draws for the round.

        All start from the parameters `start`, or, with `own_starts`, each from its own: `{name: [K, ...]}`.
        """
        # Inference mode is faster, but it does not allow autograd.
        with torch.no_grad() if self._backprop.needs_autograd else torch.inference_mode():
            return self._train(start, clients, settings, server_round, own_starts)

    def _train(
        self, start: State, clients: Sequence[int], settings: TrainSettings, server_round: int, own_starts: bool
    ) -> BlockResult:
        context, store, device = self._context, self._population.store, self.device
        start = {name: tensor.to(device) for name, tensor in start.items()}
        seed_keys = [(settings.seed, client, server_round) for client in clients]
        sizes = [self._population.size(client) for client in clients]
        dtype = next(iter(start.values())).dtype
        batches = Batches.draw(sizes, settings, seed_keys, dtype)
        # Positions of the examples in the store, steps first: [S, K, B].
        positions = self._population.store_positions(clients, batches.rows).transpose(0, 1)
        positions, batches = positions.to(store.inputs.device), batches.to(device)
        context.clients = len(clients)
        context.generators = (
            [torch.Generator().manual_seed(derive_seed(*key)) for key in seed_keys] if self._has_dropout else []
        )
        context.precision = None if settings.precision == "float32" else getattr(torch, settings.precision)
        context.rate = settings.rate(server_round) if is_plain(settings) else None
        targets = store.targets[positions].to(device)

        def train_block(
            positions: Tensor, targets: Tensor, weights: Tensor, *values: Tensor
        ) -> tuple[list[BlockParameter], Tensor]:
            block_start, block_batches = dict(zip(start, values, strict=True)), replace(batches, weights=weights)
            self._start_block(block_start, clients, block_batches, settings, own_starts)
            optimizer = None
            if context.rate is None:
                optimizer = Optimizer(self._trainable(), settings, settings.rate(server_round))
            logits = self._take_steps(positions, targets, block_batches, optimizer, dtype)
            return self._parameters(), logits

        inputs = positions, targets, batches.weights, *start.values()
        if (
            self.graphs is None
            or context.rate is None
            or own_starts
            or settings.schedule
            or len(positions) > MAX_GRAPH_STEPS
        ):
            parameters, logits = train_block(*inputs)
        else:
            kind = tuple(batches.steps), positions.shape, context.rate, context.precision, dtype
            parameters, logits = self.graphs.run(kind, train_block, inputs)
        return BlockResult.of(parameters, logits, targets, batches)

    def _take_steps(
        self, positions: Tensor, targets: Tensor, batches: Batches, optimizer: Optimizer | None, dtype: torch.dtype
    ) -> Tensor:
        """Train on the examples at `positions [S, K, B]` of the store.

        Returns the outputs of the models before each step, `[S, K * B, C]`; zeros for clients that have finished.
        """
        context, store = self._context, self._population.store
        _, clients, width = positions.shape
        by_step = [
            tensor.reshape(len(positions), -1, 1).unbind() for tensor in (targets, batches.weights.transpose(0, 1))
        ]
        example = store.inputs_at(slice(0, 1)).to(self.device)
        placeholder = example.new_zeros(1).expand(clients * width, *example.shape[1:])
        ignores_inputs = self._gram_layer is not None and isinstance(self._gram_layer.form, GramWeights)
        logits: list[Tensor] = []
        minus_one = example.new_full((clients * width, 1), -1.0)
        active = clients
        for step, (step_targets, example_weights) in enumerate(zip(*by_step, strict=True)):
            # Plain SGD skips the last clients once they have finished; `Optimizer` restores their weights instead.
            while optimizer is None and batches.steps[active - 1] <= step:
                active -= 1
            context.clients = active
            context.lengths = batches.lengths_at(step)[:active] if self._has_dropout else []
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
            if optimizer is not None:
                optimizer.step([client for client, steps in enumerate(batches.steps) if steps <= step])
        return stack_steps(logits, clients * width)

    def _start_block(
        self, start: State, clients: Sequence[int], batches: Batches, settings: TrainSettings, own_starts: bool
    ) -> None:
        """Set every layer's parameters, in the weight form that is cheapest for it."""
        _, steps, width = batches.rows.shape
        # In a lower precision, the products of the low-rank forms would be rounded twice.
        plain, is_float32 = is_plain(settings), settings.precision == "float32"
        low_rank = self._low_rank and not own_starts and is_linear(settings) and is_float32
        for name, layer in self._layers.items():
            weight, bias = start[parameter_of(name, "weight")], start.get(parameter_of(name, "bias"))
            form: WeightForm | None = None
            if low_rank and layer is self._gram_layer:
                form = self._gram_weights(weight, bias, clients, batches, plain)
            may_be_low_rank = low_rank and form is None and isinstance(layer, ClientLinear)
            if may_be_low_rank and low_rank_is_cheaper(steps * width, *weight.shape):
                form = InputHistoryWeights(weight, bias, len(clients), steps * width, plain)
            if form is not None:
                layer.start_block(form, None)
            else:
                flat = weight.flatten(2 if own_starts else 1) if isinstance(layer, ClientConv2d) else weight
                dense_bias = None if bias is None else DenseWeights(bias, len(clients), own_starts)
                layer.start_block(DenseWeights(flat, len(clients), own_starts), dense_bias)

    def _gram_weights(
        self, weight: Tensor, bias: Tensor | None, clients: Sequence[int], batches: Batches, plain: bool
    ) -> GramWeights | None:
        """Return the first layer's weights over the examples, or None if another form is cheaper.

        Also None if an example is not finite, because its inner products would make a client's weights NaN even if no
        batch contains it.
        """
        if self._use_gram is not UseGram.ALWAYS and not self._gram_matrices.are_cheaper(clients, batches, weight.shape):
            return None
        products = self._gram_matrices.of(clients)
        if not products.diagonal(dim1=1, dim2=2).isfinite().all():
            return None
        basis = [self._population.examples(client)[0].flatten(1) for client in clients]
        return GramWeights(weight, bias, basis, products, batches.rows.transpose(0, 1), plain)

    def _trainable(self) -> list[tuple[Tensor, Tensor]]:
        forms = [form for layer in self._layers.values() for form in (layer.form, layer.bias) if form is not None]
        return [pair for form in forms for pair in form.trainable()]

    def _parameters(self) -> list[BlockParameter]:
        """Return all parameters in the model's order."""
        parameters: dict[str, Any] = {}
        for name, layer in self._layers.items():
            parameters[parameter_of(name, "weight")], parameters[parameter_of(name, "bias")] = layer.form, layer.bias
            if isinstance(layer.form, LowRankWeights) and layer.form.bias is not None:
                parameters[parameter_of(name, "bias")] = LowRankBias(layer.form, layer.form.bias)
        return [parameters[name] for name in self._names]


def low_rank_is_cheaper(rows: int, outputs: int, inputs: int) -> bool:
    """Return whether `rows` stored inputs cost less than a dense weight that is read and written at each step."""
    return rows < outputs * inputs / (outputs + inputs)
