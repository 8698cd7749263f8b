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
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.chain import enters_directly, make_chain
from corymb.simulations.engine.convolution import ClientConv2d
from corymb.simulations.engine.factors import Factored, FactoredBias, Factors
from corymb.simulations.engine.forms import Form, Piece, Stacked, as_type, upto
from corymb.simulations.engine.layers import ClientDropout, ClientLinear, Now
from corymb.simulations.engine.on_examples import OnExamples
from corymb.simulations.engine.optimizer import Optimizer, is_linear, is_plain
from corymb.simulations.engine.products import Products
from corymb.simulations.engine.recorded import CudaGraphs, Recorder
from corymb.simulations.engine.trained import Trained, side_by_side
from corymb.simulations.engine.turning import parameter_of, with_client_layers
from corymb.simulations.population import Population

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
        factored: bool = True,
        static: Static = Static.NEVER,
        device: torch.device = CPU,
    ) -> None:
        population = replace(population, store=population.store.to(device))
        self._population, self._may_factor, self._static, self.device = population, factored, static, device
        self._now = Now(as_patches=device.type != "cpu")
        self._names = [name for name, _ in module.named_parameters()]
        turned, self._layers = with_client_layers(module, self._now)
        self._draws = any(isinstance(inner, ClientDropout) for inner in turned.modules())
        self._chain = make_chain(turned.to(device))
        self._products = Products(population)
        first = next(iter(self._layers.values()), None)
        enters = isinstance(first, ClientLinear) and enters_directly(turned) and static is not Static.NEVER
        self._first = first if enters else None  # the layer that the examples enter, if that is all they do
        is_fixed = self._chain.is_fixed and not population.store.is_mapped and not enters
        self.recorder = Recorder(CudaGraphs(device)) if device.type == "cuda" and is_fixed else None

    def train(
        self, start: State, clients: Sequence[int], settings: TrainSettings, server_round: int, own: bool = False
    ) -> Trained:
        """Train `clients`, largest first, from `start` on the batches that each draws for the round.

        With `own` each client has its own start, `{name: [K, ...]}`.
        """
        with torch.no_grad() if self._chain.needs_autograd else torch.inference_mode():  # of which the latter is faster
            return self._train(start, clients, settings, server_round, own)

    def _train(
        self, start: State, clients: Sequence[int], settings: TrainSettings, server_round: int, own: bool
    ) -> Trained:
        now, store, device = self._now, self._population.store, self.device
        start = {name: tensor.to(device) for name, tensor in start.items()}
        sites = [(settings.seed, client, server_round) for client in clients]
        sizes = [self._population.size(client) for client in clients]
        dtype = next(iter(start.values())).dtype
        batches = Batches.drawn(sizes, settings, sites, dtype)
        places = self._population.places(clients, batches.rows).transpose(0, 1)  # [S, K, B], as all that follow
        places, batches = places.to(store.inputs.device), batches.to(device)
        now.clients = len(clients)
        now.generators = [torch.Generator().manual_seed(seed_of(*site)) for site in sites] if self._draws else []
        now.precision = None if settings.precision == "float32" else getattr(torch, settings.precision)
        now.rate = settings.rate(server_round) if is_plain(settings) else None
        targets = store.targets[places].to(device)

        def work(places: Tensor, targets: Tensor, weights: Tensor, *values: Tensor) -> tuple[list[Piece], Tensor]:
            common, drawn = dict(zip(start, values, strict=True)), replace(batches, weights=weights)
            self._begin(common, clients, drawn, settings, own)
            optimizer = None
            if now.rate is None:
                optimizer = Optimizer(self._coordinates(), settings, settings.rate(server_round))
            scores = self._take_steps(places, targets, drawn, optimizer, dtype)
            return self._pieces(), scores

        inputs = places, targets, batches.weights, *start.values()
        if self.recorder is None or now.rate is None or own or settings.schedule or len(places) > LONGEST:
            pieces, scores = work(*inputs)
        else:
            kind = tuple(batches.steps), places.shape, now.rate, now.precision, dtype
            pieces, scores = self.recorder.run(kind, work, inputs)
        return Trained.of(pieces, scores, targets, batches)

    def _take_steps(
        self, places: Tensor, targets: Tensor, batches: Batches, optimizer: Optimizer | None, dtype: torch.dtype
    ) -> Tensor:
        """Train on the batches at `places [S, K, B]`; what the models gave for them before each step, `[S, K * B, C]`,
        zeros where a client had finished.
        """
        now, store = self._now, self._population.store
        _, clients, width = places.shape
        each = [tensor.reshape(len(places), -1, 1).unbind() for tensor in (targets, batches.weights.transpose(0, 1))]
        example = store.inputs_at(slice(0, 1)).to(self.device)
        nothing = example.new_zeros(1).expand(clients * width, *example.shape[1:])
        static = self._first is not None and isinstance(self._first.form, OnExamples)
        scores: list[Tensor] = []
        minus = example.new_full((clients * width, 1), -1.0)
        active = clients
        for step, (wanted, shares) in enumerate(zip(*each, strict=True)):
            # Plain SGD leaves those alone who have finished; under another they are put back after the step.
            while optimizer is None and batches.steps[active - 1] <= step:  # the largest come first
                active -= 1
            now.clients = active
            now.lengths = batches.lengths_at(step)[:active] if self._draws else []
            rows = active * width
            # Where the examples are never looked at, anything of their shape will do.
            inputs = upto(rows, nothing) if static else store.inputs_at(places[step, :active].flatten()).to(self.device)
            outputs = self._chain.forward(inputs)
            scores.append(as_type(outputs, dtype))
            slopes = scores[-1].softmax(dim=1).scatter_add_(1, upto(rows, wanted), upto(rows, minus))
            self._chain.backward(as_type(slopes.mul_(upto(rows, shares)), outputs.dtype))
            if optimizer is not None:
                optimizer.step([client for client, steps in enumerate(batches.steps) if steps <= step])
        return side_by_side(scores, clients * width)

    def _begin(
        self, start: State, clients: Sequence[int], batches: Batches, settings: TrainSettings, own: bool
    ) -> None:
        """Give every layer its parameters in the form that is cheapest for it."""
        _, steps, width = batches.rows.shape
        plain, is_whole = is_plain(settings), settings.precision == "float32"  # else products would be rounded twice
        factors = self._may_factor and not own and is_linear(settings) and is_whole
        for name, layer in self._layers.items():
            weight, bias = start[parameter_of(name, "weight")], start.get(parameter_of(name, "bias"))
            form: Form | None = None
            if factors and layer is self._first:
                form = self._on_examples(weight, bias, clients, batches, plain)
            may_factor = factors and form is None and isinstance(layer, ClientLinear)
            if may_factor and factored_is_cheaper(steps * width, *weight.shape):
                form = Factored(weight, bias, len(clients), steps * width, plain)
            if form is not None:
                layer.begin(form, None)
            else:
                flat = weight.flatten(2 if own else 1) if isinstance(layer, ClientConv2d) else weight
                mine = None if bias is None else Stacked(bias, len(clients), own)
                layer.begin(Stacked(flat, len(clients), own), mine)

    def _on_examples(
        self, weight: Tensor, bias: Tensor | None, clients: Sequence[int], batches: Batches, plain: bool
    ) -> OnExamples | None:
        """The first layer's parameters over the examples, if that is cheapest, and no example is without numbers: it
        would reach clients that have not drawn it.
        """
        if self._static is not Static.ALWAYS and not self._products.are_cheap(clients, batches, weight.shape):
            return None
        products = self._products.of(clients)
        if not products.diagonal(dim1=1, dim2=2).isfinite().all():
            return None
        basis = [self._population.examples(client)[0].flatten(1) for client in clients]
        return OnExamples(weight, bias, basis, products, batches.rows.transpose(0, 1), plain)

    def _coordinates(self) -> list[tuple[Tensor, Tensor]]:
        forms = [form for layer in self._layers.values() for form in (layer.form, layer.bias) if form is not None]
        return [pair for form in forms for pair in form.coordinates()]

    def _pieces(self) -> list[Piece]:
        """All parameters, in the model's order."""
        pieces: dict[str, Any] = {}
        for name, layer in self._layers.items():
            pieces[parameter_of(name, "weight")], pieces[parameter_of(name, "bias")] = layer.form, layer.bias
            if isinstance(layer.form, Factors) and layer.form.bias is not None:
                pieces[parameter_of(name, "bias")] = FactoredBias(layer.form, layer.form.bias)
        return [pieces[name] for name in self._names]


def factored_is_cheaper(rows: int, outputs: int, inputs: int) -> bool:
    """Whether a history of so many rows costs less than weights that are read and written at each step."""
    return rows < outputs * inputs / (outputs + inputs)
