"""A module turned into one that trains a block of clients at once, each with parameters of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.client.app import seed_of
from corymb.simulations.data.population import Population
from corymb.simulations.engine.backprop import enters_directly, make_backprop
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.block_result import BlockResult, side_by_side
from corymb.simulations.engine.client_layers import parameter_of, to_client_layers
from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.cuda_graphs import CudaGraphs, Recorder
from corymb.simulations.engine.gram_products import Products
from corymb.simulations.engine.gram_weights import GramWeights
from corymb.simulations.engine.layers import ClientDropout, ClientLinear, StepContext
from corymb.simulations.engine.low_rank import LowRank, LowRankBias, LowRankWeights
from corymb.simulations.engine.optimizer import Optimizer, is_linear, is_plain
from corymb.simulations.engine.weight_forms import DenseWeights, Piece, WeightForm, as_type, upto

State = Mapping[str, Tensor]
CPU = torch.device("cpu")
LONGEST = 2000  # steps of a recording, whose operations all lie in memory


class Static(Enum):
    """Whether the first layer's factors stand on the examples themselves."""

    NEVER = "never"
    CHEAPEST = "where it costs less"
    ALWAYS = "always"


class Program:
    """Trains blocks of `population`'s clients as `client.train` would train each, with cross-entropy.

    `factored` says whether layers may take factored form, and `static` whether the first may stand on the examples,
    for which they have to be on the CPU.
    It works on `device`, where the examples stay. Raises `ValueError`, naming the layer, for a module that it cannot
    train.
    """

    def __init__(
        self,
        module: nn.Module,
        population: Population,
        low_rank: bool = True,
        static: Static = Static.NEVER,
        device: torch.device = CPU,
    ) -> None:
        population = replace(population, store=population.store.to(device))
        self._population, self._may_be_low_rank, self._static, self.device = population, low_rank, static, device
        self._context = StepContext(as_patches=device.type != "cpu")
        self._names = [name for name, _ in module.named_parameters()]
        turned, self._layers = to_client_layers(module, self._context)
        self._draws = any(isinstance(inner, ClientDropout) for inner in turned.modules())
        self._backprop = make_backprop(turned.to(device))
        self._products = Products(population)
        first = next(iter(self._layers.values()), None)
        enters = isinstance(first, ClientLinear) and enters_directly(turned) and static is not Static.NEVER
        self._first = first if enters else None  # the layer that the examples enter, if that is all they do
        is_fixed = self._backprop.is_fixed and not population.store.is_mapped and not enters
        self.recorder = Recorder(CudaGraphs(device)) if device.type == "cuda" and is_fixed else None

    def train(
        self, start: State, clients: Sequence[int], settings: TrainSettings, server_round: int, own: bool = False
    ) -> BlockResult:
        """Train `clients`, largest first, from `start` on the batches that each draws for the round.

        With `own` each client has its own start, `{name: [K, ...]}`.
        """
        with (
            torch.no_grad() if self._backprop.needs_autograd else torch.inference_mode()
        ):  # of which the latter is faster
            return self._train(start, clients, settings, server_round, own)

    def _train(
        self, start: State, clients: Sequence[int], settings: TrainSettings, server_round: int, own: bool
    ) -> BlockResult:
        context, store, device = self._context, self._population.store, self.device
        start = {name: tensor.to(device) for name, tensor in start.items()}
        sites = [(settings.seed, client, server_round) for client in clients]
        sizes = [self._population.size(client) for client in clients]
        dtype = next(iter(start.values())).dtype
        batches = Batches.drawn(sizes, settings, sites, dtype)
        places = self._population.places(clients, batches.rows).transpose(0, 1)  # [S, K, B], as all that follow
        places, batches = places.to(store.inputs.device), batches.to(device)
        context.clients = len(clients)
        context.generators = [torch.Generator().manual_seed(seed_of(*site)) for site in sites] if self._draws else []
        context.precision = None if settings.precision == "float32" else getattr(torch, settings.precision)
        context.rate = settings.rate(server_round) if is_plain(settings) else None
        targets = store.targets[places].to(device)

        def work(places: Tensor, targets: Tensor, weights: Tensor, *values: Tensor) -> tuple[list[Piece], Tensor]:
            common, drawn = dict(zip(start, values, strict=True)), replace(batches, weights=weights)
            self._begin(common, clients, drawn, settings, own)
            optimizer = None
            if context.rate is None:
                optimizer = Optimizer(self._coordinates(), settings, settings.rate(server_round))
            scores = self._take_steps(places, targets, drawn, optimizer, dtype)
            return self._pieces(), scores

        inputs = places, targets, batches.weights, *start.values()
        if self.recorder is None or context.rate is None or own or settings.schedule or len(places) > LONGEST:
            pieces, scores = work(*inputs)
        else:
            kind = tuple(batches.steps), places.shape, context.rate, context.precision, dtype
            pieces, scores = self.recorder.run(kind, work, inputs)
        return BlockResult.of(pieces, scores, targets, batches)

    def _take_steps(
        self, places: Tensor, targets: Tensor, batches: Batches, optimizer: Optimizer | None, dtype: torch.dtype
    ) -> Tensor:
        """Train on the batches at `places [S, K, B]`; what the models gave for them before each step, `[S, K * B, C]`,
        zeros where a client had finished.
        """
        context, store = self._context, self._population.store
        _, clients, width = places.shape
        each = [tensor.reshape(len(places), -1, 1).unbind() for tensor in (targets, batches.weights.transpose(0, 1))]
        example = store.inputs_at(slice(0, 1)).to(self.device)
        nothing = example.new_zeros(1).expand(clients * width, *example.shape[1:])
        static = self._first is not None and isinstance(self._first.form, GramWeights)
        scores: list[Tensor] = []
        minus = example.new_full((clients * width, 1), -1.0)
        active = clients
        for step, (wanted, shares) in enumerate(zip(*each, strict=True)):
            # Plain SGD leaves those alone who have finished; under another they are put back after the step.
            while optimizer is None and batches.steps[active - 1] <= step:  # the largest come first
                active -= 1
            context.clients = active
            context.lengths = batches.lengths_at(step)[:active] if self._draws else []
            rows = active * width
            # Where the examples are never looked at, anything of their shape will do.
            inputs = upto(rows, nothing) if static else store.inputs_at(places[step, :active].flatten()).to(self.device)
            outputs = self._backprop.forward(inputs)
            scores.append(as_type(outputs, dtype))
            slopes = scores[-1].softmax(dim=1).scatter_add_(1, upto(rows, wanted), upto(rows, minus))
            self._backprop.backward(as_type(slopes.mul_(upto(rows, shares)), outputs.dtype))
            if optimizer is not None:
                optimizer.step([client for client, steps in enumerate(batches.steps) if steps <= step])
        return side_by_side(scores, clients * width)

    def _begin(
        self, start: State, clients: Sequence[int], batches: Batches, settings: TrainSettings, own: bool
    ) -> None:
        """Give every layer its parameters in the form that is cheapest for it."""
        _, steps, width = batches.rows.shape
        plain, is_whole = is_plain(settings), settings.precision == "float32"  # else products would be rounded twice
        factors = self._may_be_low_rank and not own and is_linear(settings) and is_whole
        for name, layer in self._layers.items():
            weight, bias = start[parameter_of(name, "weight")], start.get(parameter_of(name, "bias"))
            form: WeightForm | None = None
            if factors and layer is self._first:
                form = self._on_examples(weight, bias, clients, batches, plain)
            may_factor = factors and form is None and isinstance(layer, ClientLinear)
            if may_factor and low_rank_is_cheaper(steps * width, *weight.shape):
                form = LowRank(weight, bias, len(clients), steps * width, plain)
            if form is not None:
                layer.begin(form, None)
            else:
                flat = weight.flatten(2 if own else 1) if isinstance(layer, ClientConv2d) else weight
                mine = None if bias is None else DenseWeights(bias, len(clients), own)
                layer.begin(DenseWeights(flat, len(clients), own), mine)

    def _on_examples(
        self, weight: Tensor, bias: Tensor | None, clients: Sequence[int], batches: Batches, plain: bool
    ) -> GramWeights | None:
        """The first layer's parameters over the examples, if that is cheapest, and no example is without numbers: it
        would reach clients that have not drawn it.
        """
        if self._static is not Static.ALWAYS and not self._products.are_cheap(clients, batches, weight.shape):
            return None
        products = self._products.of(clients)
        if not products.diagonal(dim1=1, dim2=2).isfinite().all():
            return None
        basis = [self._population.examples(client)[0].flatten(1) for client in clients]
        return GramWeights(weight, bias, basis, products, batches.rows.transpose(0, 1), plain)

    def _coordinates(self) -> list[tuple[Tensor, Tensor]]:
        forms = [form for layer in self._layers.values() for form in (layer.form, layer.bias) if form is not None]
        return [pair for form in forms for pair in form.coordinates()]

    def _pieces(self) -> list[Piece]:
        """All parameters, in the model's order."""
        pieces: dict[str, Any] = {}
        for name, layer in self._layers.items():
            pieces[parameter_of(name, "weight")], pieces[parameter_of(name, "bias")] = layer.form, layer.bias
            if isinstance(layer.form, LowRankWeights) and layer.form.bias is not None:
                pieces[parameter_of(name, "bias")] = LowRankBias(layer.form, layer.form.bias)
        return [pieces[name] for name in self._names]


def low_rank_is_cheaper(rows: int, outputs: int, inputs: int) -> bool:
    """Whether a history of so many rows costs less than weights that are read and written at each step."""
    return rows < outputs * inputs / (outputs + inputs)
