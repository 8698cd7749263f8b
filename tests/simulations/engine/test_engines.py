"""Every engine trains clients as `serial` does, which trains them one after another."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.algorithms.algorithm import Correction
from corymb.client.app import batch_generator, has_batch_norm
from corymb.client.batches import training_batches
from corymb.client.seeds import derive_seed
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine import frequencies
from corymb.simulations.engine import linear as linears
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.blocks import MAX_PADDING, Task, Trainer, cut_into_blocks
from corymb.simulations.engine.convolution import library_work
from corymb.simulations.engine.engine import MultiDeviceEngine, obstacle
from corymb.simulations.engine.factory import TrainerMaker, find_trainer, make_engine
from corymb.simulations.engine.gram_products import UseGram
from corymb.simulations.engine.gram_weights import GramWeights
from corymb.simulations.engine.low_rank import InputHistoryWeights
from corymb.simulations.engine.program import Program
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.weight_forms import DenseWeights, WeightForm
from corymb.simulations.engine.work import work_of
from corymb.simulations.engine.workers import WorkerEngine
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import resolve
from corymb.strategies import Layout
from corymb.tests.support import run_rule

CLOSE = 1e-5  # relative, per parameter, after five rounds
EXACT = 1e-9  # the same in float64
SMALL: dict[str, Any] = {
    "name": "small",
    "rounds": 3,
    "rules": ["fedavg"],
    "partition": {"clients": 7, "alpha": 0.3},  # sizes differ, so batches end at different steps
    "participation": {"kind": "bernoulli", "probability": 0.7},
    "model": {"kind": "mlp", "options": {"hidden": 9}},
}
SCHEDULE = {"schedule": "StepLR", "schedule_options": {"step_size": 1}}
CNN = {"model": {"kind": "cnn", "options": {"hidden": 8, "channels": 3}}}


def population(sizes: Sequence[int], shape: tuple[int, ...] = (1, 6, 6), seed: int = 0) -> Population:
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    inputs = torch.randn(count, *shape, generator=generator)
    return Population(Examples(inputs, torch.randint(0, 4, (count,), generator=generator)), np.cumsum([0, *sizes]))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


def maker_for(model: Callable[[], nn.Module], clients: Population, engine: str = "low_rank") -> TrainerMaker:
    maker = find_trainer(engine, model, clients.store)
    assert maker is not None
    return maker


def trainer_for(model: Callable[[], nn.Module], clients: Population) -> Trainer:
    return maker_for(model, clients)(clients, torch.device("cpu"))


def noise(parameters: int, client: int, number: int) -> Tensor:
    """Return what is added to the gradients of a client in a round, `[P]`, by the tests of that."""
    generator = torch.Generator().manual_seed(1000 * number + client)
    return 0.1 * torch.randn(parameters, generator=generator, dtype=torch.float64)


def one_by_one(
    module: nn.Module,
    start: Tensor,
    clients: Population,
    train_settings: TrainSettings,
    number: int,
    with_noise: bool = False,
) -> Tensor:
    """Train every client alone and return the models, `[K, P]`."""
    models, layout = [], Layout.of_module(module)
    for client in range(len(clients)):
        nn.utils.vector_to_parameters(start.clone(), module.parameters())
        torch.default_generator.manual_seed(derive_seed(train_settings.seed, client, number))
        batches = training_batches(
            TensorDataset(*clients.examples(client)),
            train_settings,
            batch_generator(train_settings.seed, client, number),
            has_batch_norm(module),
        )
        added = layout.split(noise(len(start), client, number).to(start.dtype)) if with_noise else None
        correction = None if added is None else Correction(added, 0.0, {})
        train(module, batches, train_settings, server_round=number, correction=correction)
        models.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    return torch.stack(models)


def together(
    trainer: Any,
    layout: Layout,
    start: Tensor,
    clients: Population,
    train_settings: TrainSettings,
    number: int,
    buffers: Mapping[str, Tensor],
    with_noise: bool = False,
) -> Tensor:
    """Train the clients in blocks and return the models, `[K, P]`, and check the sums and bounds of each block."""
    models = torch.empty(len(clients), len(start), dtype=start.dtype)
    for block in cut_into_blocks([clients.size(client) for client in range(len(clients))], train_settings):
        added = [noise(len(start), client, number).to(start.dtype) for client in block]
        offsets = layout.split(torch.stack(added)) if with_noise else None
        result = trainer.train({**layout.split(start), **buffers}, block, train_settings, number, offsets=offsets)
        models[block] = result.models()
        weights = torch.rand(len(block), generator=torch.Generator().manual_seed(number), dtype=start.dtype)
        update = weights @ (models[block] - start)
        torch.testing.assert_close(result.weighted_update(weights), update, rtol=1e-4, atol=1e-5)
        for offset in (None, update):
            direct = (models[block] - start - (0 if offset is None else offset)).double().square().sum(dim=1)
            close: Any = {"rtol": 1e-9, "atol": 1e-15} if start.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-9}
            torch.testing.assert_close(result.squared_distances(offset), direct, **close)
        assert (models[block].abs().amax(dim=1) <= torch.tensor(result.report.bounds) * 1.0001).all()
    return models


def differences(
    module: nn.Module,
    trainer: Any,
    clients: Population,
    train_settings: TrainSettings,
    rounds: int = 5,
    with_noise: bool = False,
) -> list[float]:
    """Return each parameter's relative difference between the mean models of the engine and of `serial`.

    With noise, a vector of each client's own is added to its gradients.
    """
    layout = Layout.of_module(module)
    expected = actual = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    for number in range(1, rounds + 1):
        next_expected = one_by_one(module, expected, clients, train_settings, number, with_noise).mean(dim=0)
        if not (next_expected.abs() < 100).all():
            break  # diverging training magnifies any rounding error
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        models = together(trainer, layout, actual, clients, train_settings, number, buffers, with_noise)
        expected, actual = next_expected, models.mean(dim=0)
    pairs = zip(layout.split(actual).values(), layout.split(expected).values(), strict=True)
    return [float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs]


ACTIVATIONS = [nn.ReLU, nn.Tanh, lambda: nn.Dropout(0.3), nn.Sigmoid]


@st.composite
def networks(draw: Any) -> nn.Module:
    """Small sequences, with and without convolutions, dropout and biases."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    channels, side = 1, 6
    for _ in range(draw(st.integers(0, 2))):
        wider = draw(st.integers(1, 3))
        kernel = draw(st.sampled_from([1, 3]))
        layers += [nn.Conv2d(channels, wider, kernel, padding=kernel // 2, bias=draw(st.booleans()))]
        layers += [draw(st.sampled_from(ACTIVATIONS))()]
        channels = wider
        if side > 3 and draw(st.booleans()):
            layers.append(nn.MaxPool2d(2))
            side //= 2
    layers.append(nn.Flatten())
    width = channels * side * side
    for _ in range(draw(st.integers(0, 2))):
        hidden = draw(st.integers(2, 40))
        layers += [nn.Linear(width, hidden, bias=draw(st.booleans())), draw(st.sampled_from(ACTIVATIONS))()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, 4))


LINEAR = [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}, {"weight_decay": 0.1}]


@st.composite
def all_settings(draw: Any, optimizers: Sequence[str]) -> TrainSettings:
    """Training settings."""
    optimizer = draw(st.sampled_from(optimizers))
    length = draw(st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 4}, {"steps": 1}]))
    return TrainSettings(
        learning_rate=0.01 if optimizer == "SGD" else 0.005,  # at 0.05 some networks magnify rounding errors by 10^9
        batch_size=draw(st.integers(2, 9)),
        optimizer=optimizer,
        optimizer_options=draw(st.sampled_from(LINEAR)) if optimizer == "SGD" else {},
        proximal=draw(st.sampled_from([0.0, 0.5])),
        drop_last=draw(st.booleans()),
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
        **length,
    )


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=7)
SEARCH = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def in_double(module: nn.Module, clients: Population) -> tuple[nn.Module, Population]:
    """Convert to float64: rounding in float32 may flip a ReLU near zero, and Adam may divide by a tiny number."""
    return module.double(), replace(clients, store=replace(clients.store, inputs=clients.store.inputs.double()))


@SEARCH
@given(
    networks(),
    all_settings(["SGD"]),
    SIZES,
    st.sampled_from(["cheapest", "always", "gram"]),
    st.booleans(),
    st.booleans(),
)
def test_low_rank_is_serial(
    module: nn.Module,
    train_settings: TrainSettings,
    sizes: list[int],
    form: str,
    by_frequency: bool,
    with_noise: bool,
) -> None:
    """With low-rank weights where they are cheaper, in all linear layers, or over the examples in the first layer."""
    module, clients = in_double(module, population(sizes))
    trainer = Program(module, clients, use_gram=UseGram.ALWAYS if form == "gram" else UseGram.IF_CHEAPER)
    with pytest.MonkeyPatch.context() as patch:
        if form == "always":
            patch.setattr(linears, "low_rank_is_cheaper", lambda *shape: True)
        if by_frequency:  # `FourierConv` even for small convolutions
            patch.setattr(frequencies, "MAX_COST_RATIO", inf)
        assert max(differences(module, trainer, clients, train_settings, with_noise=with_noise)) < EXACT


@SEARCH
@given(networks(), all_settings(["SGD", "Adam", "RMSprop"]), SIZES, st.booleans())
def test_batched_is_serial(
    module: nn.Module, train_settings: TrainSettings, sizes: list[int], with_noise: bool
) -> None:
    module, clients = in_double(module, population(sizes))
    trainer = Program(module, clients, low_rank=False)
    assert max(differences(module, trainer, clients, train_settings, with_noise=with_noise)) < EXACT


class Branching(nn.Module):
    """Not a sequence of layers: it changes outputs in place and pools a tensor with gaps in memory."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.on, self.last = nn.ReLU(inplace=True), nn.Linear(12, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.on(self.second(self.on(self.first(inputs))))
        return self.last(nn.functional.max_pool2d(hidden[..., 1:-1, 1:-1], 2).flatten(1))  # type: ignore[no-any-return]


class Crop(nn.Module):
    """Returns a view of the images without their margins."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[..., 1:-1, 1:-1]


class TanhPool(nn.MaxPool2d):
    """Pooling whose own outputs autograd saves for the backward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(super().forward(inputs))


@pytest.mark.parametrize(
    "module",
    [
        Branching(2),
        Branching(6),
        nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1), nn.Tanh(), Crop(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 4)
        ),
        nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), TanhPool(2), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), nn.Conv2d(4, 4, 4)),
    ],
    ids=["autograd", "autograd-wide", "crop", "subclass", "convolution last"],
)
def test_modules_with_unusual_use_of_memory_are_serial(module: nn.Module) -> None:
    if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Conv2d):
        module = nn.Sequential(*module, nn.Flatten())
    module, clients = in_double(module, population([9, 4, 12, 1]))
    train_settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, Program(module, clients), clients, train_settings)) < EXACT


def test_convolutions_through_frequencies_are_serial_in_float32() -> None:
    """With a layer that is large enough for `FourierConv` and lies before another convolution."""
    torch.manual_seed(4)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    clients = population([12, 10, 7])
    trainer = Program(module, clients)
    train_settings = TrainSettings(batch_size=10, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, trainer, clients, train_settings)) < CLOSE
    methods = [method for layer in trainer._layers.values() for method in getattr(layer, "_methods", {}).values()]
    assert any(isinstance(method, frequencies.FourierConv) for method in methods)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"padding": 2}, {"dilation": 2, "padding": (1, 2)}, {"stride": (1, 2), "bias": False}],
    ids=str,
)
def test_convolutions_with_patch_columns_are_serial(options: dict[str, Any]) -> None:
    """A GPU uses this method; here it runs on the CPU."""
    torch.manual_seed(4)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, **options), nn.Flatten(), nn.LazyLinear(4)
    )
    module(torch.zeros(1, 1, 6, 6))
    module, clients = in_double(module, population([9, 4, 12, 1]))
    trainer = Program(module, clients)
    trainer._context.use_patches = True
    settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, trainer, clients, settings)) < EXACT


@pytest.mark.parametrize("options", LINEAR, ids=str)
@pytest.mark.parametrize("low_rank", [True, False])
def test_in_float32_engines_are_close_to_serial(options: dict[str, Any], low_rank: bool) -> None:
    torch.manual_seed(3)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(27, 40), nn.Tanh(), nn.Linear(40, 4),
    )  # fmt: skip
    train_settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options=options)
    clients = population([9, 4, 12, 1])
    assert max(differences(module, Program(module, clients, low_rank), clients, train_settings)) < CLOSE


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 0.0])
def test_squared_distances_of_each_weight_form(scale: float, spread: float) -> None:
    """Also for nearly equal inputs, whose terms cancel, and at scales whose squares float32 cannot represent."""
    torch.manual_seed(0)
    start, bias = scale * torch.randn(5, 30), torch.randn(5)
    inputs = torch.randn(30) + spread * torch.randn(3, 8, 30)
    gradients = scale * torch.randn(3, 8, 5)
    rows = torch.arange(8).expand(1, 3, 8)
    first = GramWeights(start, bias, list(inputs), inputs @ inputs.mT, rows, True)
    forms: list[WeightForm] = [first, InputHistoryWeights(start, bias, 3, 8, True), DenseWeights(start, 3)]
    offset = scale * torch.randn(5, 30)
    for form in forms:
        form.outputs(inputs)
        form.apply_gradients(gradients, inputs, 0.1)
        update = -0.1 * gradients.double().mT @ inputs.double()
        for direct, squares in (
            (update, form.squared_distances(None)),
            (update - offset, form.squared_distances(offset.flatten())),
        ):
            torch.testing.assert_close(squares, direct.square().sum(dim=(1, 2)), rtol=1e-5, atol=0)


class Odd(nn.Module):
    """Not a sequence of layers; adds and subtracts a large constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 20), nn.Linear(20, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        shifted = 1000 + inputs.flatten(1)  # would lose most digits in bfloat16
        outputs: Tensor = self.last(self.first(shifted - 1000).tanh())
        return outputs


@pytest.mark.parametrize("options", LINEAR[:2], ids=str)
@pytest.mark.parametrize("is_sequence", [True, False])
def test_bfloat16_is_used_as_serial_uses_it(options: dict[str, Any], is_sequence: bool) -> None:
    """Smooth layers only, because rounding may flip a ReLU near zero. bfloat16 has a relative precision of 1/256."""
    torch.manual_seed(3)
    smooth = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 3),
        nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4),
    )  # fmt: skip
    module: nn.Module = smooth if is_sequence else Odd()
    clients = population([12, 9, 4, 1])
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    train_settings = TrainSettings(
        batch_size=4, epochs=2, learning_rate=0.05, optimizer_options=options, precision="bfloat16", device="cpu"
    )
    assert obstacle(train_settings, torch.device("cpu"))  # because bfloat16 is slower than float32 on a CPU
    trainer = Program(deepcopy(module), clients)
    trainer._context.use_patches = True  # as on a GPU
    actual = trainer.train(Layout.of_module(module).split(start), range(4), train_settings, 1).models()
    in_float32 = one_by_one(module, start, clients, train_settings.model_copy(update={"precision": "float32"}), 1)
    in_bfloat16 = one_by_one(module, start, clients, train_settings, 1)
    assert (actual - in_bfloat16).norm() < 0.01 * (in_bfloat16 - start).norm()
    assert (actual - in_float32).norm() > 0.001 * (in_float32 - start).norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_on_each_device_the_engine_is_serial(device: str) -> None:
    torch.manual_seed(3)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 40), nn.ReLU(),
        nn.Linear(40, 4),
    )  # fmt: skip
    module, clients = in_double(module, population([9, 4, 12, 1]))
    trainer = Program(module, clients, device=torch.device(device))
    train_settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, trainer, clients, train_settings)) < EXACT


def test_a_wrong_padding_mask_makes_the_comparison_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation check of the tests above: they fail if the padding mask is one example too long or too short.

    The test injects the mistake into the return value of `Batches.draw`.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
    clients, train_settings = population([7, 12, 3]), TrainSettings(batch_size=5, epochs=2)
    correct = Batches.draw
    for shift in (1, -1):

        def wrong(*arguments: Any, shift: int = shift) -> Batches:
            batches = correct(*arguments)
            lengths = (batches.weights > 0).sum(dim=2, keepdim=True)
            is_example = (torch.arange(batches.weights.shape[2]) < lengths + shift) & (lengths > 0)
            return Batches(batches.rows, is_example / lengths.clamp(min=1), batches.steps)

        for low_rank in (True, False):
            trainer = Program(module, clients, low_rank)
            monkeypatch.setattr(Batches, "draw", correct)
            assert max(differences(module, trainer, clients, train_settings, rounds=1)) < CLOSE
            monkeypatch.setattr(Batches, "draw", wrong)
            assert max(differences(module, trainer, clients, train_settings, rounds=1)) > 10 * CLOSE


class Scaled(nn.Module):
    """Has a parameter outside its layers, which only `Vmapped` supports."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs.flatten(1) * self.scale)
        return outputs


def test_a_module_with_own_parameters_is_vmapped() -> None:
    clients = population([9, 4, 12])
    torch.manual_seed(1)
    module = Scaled()
    trainer = trainer_for(lambda: module, clients)
    assert isinstance(trainer, Vmapped)
    for options in LINEAR:
        train_settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options=options)
        assert max(differences(module, trainer, clients, train_settings)) < CLOSE


class Residual(nn.Module):
    """Uses its input twice, so that the first layer must not use `GramWeights`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        outputs: Tensor = self.last(torch.relu(self.first(flat)) + flat)
        return outputs


def test_no_gram_weights_if_the_input_is_used_twice() -> None:
    clients = population([9, 4])
    torch.manual_seed(1)
    module = Residual()
    trainer = trainer_for(lambda: module, clients)
    assert isinstance(trainer, Program)
    assert trainer._gram_layer is None
    assert max(differences(module, trainer, clients, TrainSettings(batch_size=4, epochs=1))) < CLOSE


class Clamped(nn.Module):
    """Changes only large examples."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs.flatten(1).clamp(-5, 5))
        return outputs


class Twice(nn.Module):
    """Uses a layer twice; its weights would change between its two backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        outputs: Tensor = self.last(flat + 0.03 * torch.tanh(self.middle(torch.tanh(self.middle(flat)))))
        return outputs


def relu_first(shape: tuple[int, ...] = (), classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(36, 4))


@pytest.mark.parametrize("make", [Clamped, Twice, relu_first, lambda: nn.Sequential(nn.Flatten(), Inner())])
def test_the_code_of_a_module_is_respected(make: Any) -> None:
    clients = population([9, 4])
    clients.store.inputs[:6].abs_().clamp_(max=1)  # the code does not change such small examples
    clients.store.inputs[6:].mul_(4)
    torch.manual_seed(1)
    module = make()
    trainer = trainer_for(lambda: module, clients)
    for options in LINEAR:
        train_settings = TrainSettings(batch_size=4, epochs=1, learning_rate=0.01, optimizer_options=options)
        assert max(differences(module, trainer, clients, train_settings, rounds=2)) < CLOSE


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs)
        return outputs


def test_one_nan_example_does_not_rule_out_the_engine() -> None:
    clients = population([9, 4])
    clients.store.inputs[0] = torch.nan
    assert isinstance(trainer_for(linear, clients), Program)


def test_blocks_outlive_their_round() -> None:
    """Models read in a later round, sums that are never read, and more sums at once than a worker has slots for."""
    clients = population([5] * 12)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    layout = Layout.of_module(module)
    engines = [make_engine(name, maker_for(linear, clients), clients, layout, 2) for name in ("low_rank", "processes")]
    pair = [trainer_for(linear, clients) for _ in range(2)]
    engines.append(MultiDeviceEngine(pair, layout))
    train_settings = TrainSettings(batch_size=5, epochs=1)
    start = torch.zeros(layout.num_parameters)
    results = []
    for engine in engines:
        tasks = [Task((client,), (client,), train_settings, 1) for client in range(12)]
        blocks: list[Any] = [block for _, block, _ in engine.train(tasks, start)]
        later = engine.train([Task((0,), (0,), train_settings, 2)], start + 1)
        sums = torch.zeros(len(blocks), len(start), dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        added = [b.add_to(total, one, start) for b, total in zip(blocks, sums, strict=True)]  # more than SLOTS
        models = [torch.cat(list(block.pieces(0))) for block in blocks[::-1]][::-1]
        next(later)
        pending = [block.squared_distances(start + 1) for block in blocks]
        rows = torch.empty(len(blocks), len(start))
        written = [
            block.copy_to([(0, row)]) for block, row in zip(blocks, rows, strict=True)
        ]  # one block at a time fits
        for finish in written:
            finish()
        torch.testing.assert_close(rows, torch.stack(models), rtol=0, atol=0)
        squares = torch.cat([finish() for finish in pending])
        torch.testing.assert_close(squares, (rows - 1).double().square().sum(dim=1), rtol=1e-5, atol=0)
        unread = [block.add_to(torch.zeros_like(sums[0]), one, start) for block in blocks[:2]]
        for finish in added:
            finish()
        results.append((sums, torch.stack(models)))
        del unread
        ((_, block, _),) = engine.train([Task((0,), (0,), train_settings, 3)], start)  # despite the unread sums
        assert not isinstance(block, Exception)
        engine.close()
    for other in results[1:]:
        for first_result, other_result in zip(results[0], other, strict=True):
            torch.testing.assert_close(first_result.float(), other_result.float(), rtol=1e-6, atol=1e-7)


def test_a_dead_worker_raises_an_error() -> None:
    clients = population([5] * 8)
    layout = Layout.of_module(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    engine = make_engine("processes", maker_for(linear, clients), clients, layout, 2)
    assert isinstance(engine, WorkerEngine)
    engine._workers[0].process.kill()
    engine._workers[0].process.join()
    tasks = [Task((client,), (client,), TrainSettings(epochs=1), 1) for client in range(8)]
    with pytest.raises(ChildProcessError, match="A worker process has died"):
        list(engine.train(tasks, torch.zeros(layout.num_parameters)))
    engine.close()


class Mixing(nn.Linear):
    """Subtracts the mean of the batch, which differs if clients train together."""

    def __init__(self) -> None:
        super().__init__(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        return super().forward(flat - flat.mean())


class MixingInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        outputs: Tensor = self.last(flat - flat.mean(dim=0))
        return outputs


class MixingAtLast(nn.Module):
    """Mixes the examples with a weight that is zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.share = nn.Linear(36, 4), nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs.flatten(1))
        return outputs + self.share * outputs.mean(dim=0)


def test_a_module_that_mixes_its_batch_is_rejected() -> None:
    for make in (Mixing, MixingInside, MixingAtLast):
        with pytest.raises(ValueError, match="the model's code mixes the examples of a batch"):
            trainer_for(make, population([5, 6]))


def test_a_module_with_parameter_hooks_is_rejected() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    next(module.parameters()).register_hook(lambda gradients: gradients.clamp(-100, 100))  # no effect in the trial
    with pytest.raises(ValueError, match="the model's parameters have hooks"):
        trainer_for(lambda: module, population([5, 6]))


class Gated(nn.Module):
    """Reads the examples outside its first layer too, with an effect on few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(36, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        gate = (flat.mean(1, keepdim=True) > 1).float()
        hidden = torch.relu(self.first(flat))
        outputs: Tensor = gate * self.one(hidden) + (1 - gate) * self.other(hidden)
        return outputs


class FunctionalDropout(nn.Module):
    """Has an attribute that cannot be copied, and a functional dropout that seldom has an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs.view(inputs.size(0), -1)))
        outputs: Tensor = self.last(nn.functional.dropout(hidden, 0.01, self.training))
        return outputs


@pytest.mark.parametrize("make", [Gated, FunctionalDropout])
def test_effects_that_a_trial_would_miss_are_traced(make: Any) -> None:
    clients = population([30, 4, 60])
    clients.store.inputs[::2] += 2
    torch.manual_seed(1)
    module = make()
    trainer = trainer_for(lambda: module, clients)
    assert isinstance(trainer, Program)
    train_settings = TrainSettings(batch_size=5, epochs=2, learning_rate=0.05)
    assert max(differences(module, trainer, clients, train_settings)) < CLOSE


def tied(shape: tuple[int, ...], classes: int) -> nn.Module:
    first, second = nn.Linear(torch.Size(shape).numel(), 8), nn.Linear(8, 8)
    third = nn.Linear(8, 8)
    third.weight = second.weight
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), third, nn.Tanh(), nn.Linear(8, classes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {"kind": "corymb.tests.simulations.engine.test_engines:tied"}}, "share their parameters"),
        ({"train": {"optimizer": "Adafactor"}}, "one after another because the optimizer 'Adafactor' does not"),
        (
            {"train": {"precision": "bfloat16"}},
            "one after another because blocks on 'cpu' do not support precision = 'bfloat16'",
        ),
    ],
)
def test_each_warning_is_logged_once(
    changes: dict[str, Any],
    text: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    small = Experiment(**{**SMALL, **changes})
    with caplog.at_level(logging.WARNING):
        run_rule(small, 0, 0, tmp_path)
    assert [text in line for line in caplog.messages].count(True) == 1


def test_a_nan_example_affects_only_the_clients_that_draw_it() -> None:
    clients, train_settings = population([40, 30]), TrainSettings(batch_size=4, steps=2)
    clients.store.inputs[7] = torch.nan
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    trainer = Program(module, clients, use_gram=UseGram.ALWAYS)
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    layout = Layout.of_module(module)
    drew = []
    for number in range(1, 9):
        expected = one_by_one(module, start, clients, train_settings, number)
        actual = trainer.train(layout.split(start), range(2), train_settings, number).models()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
        drew.append(bool(expected.isnan().any()))
    assert set(drew) == {True, False}


@pytest.mark.parametrize("end", [[nn.Conv2d(4, 4, 4)], [nn.Conv2d(4, 4, 2), nn.ReLU(), nn.MaxPool2d(3)]])
def test_metrics_are_right_if_a_convolution_comes_last(end: list[nn.Module]) -> None:
    """The convolution reuses the memory of its outputs in the next step."""
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), *end, nn.Flatten())
    clients, train_settings = population([9, 4]), TrainSettings(batch_size=4, epochs=2)
    trainer = trainer_for(lambda: deepcopy(module), clients)
    assert isinstance(trainer, Program)
    start = dict(module.named_parameters())
    report = trainer.train(
        {name: tensor.detach() for name, tensor in start.items()}, range(2), train_settings, 1
    ).report
    for client in range(2):
        batches = training_batches(
            TensorDataset(*clients.examples(client)), train_settings, batch_generator(train_settings.seed, client, 1)
        )
        metrics = train(deepcopy(module), batches, train_settings)
        assert report.losses[client] / report.examples[client] == pytest.approx(metrics["loss"], rel=1e-5)
        assert report.correct is not None
        assert report.correct[client] / report.examples[client] == pytest.approx(metrics["accuracy"])


def with_norm(shape: tuple[int, ...], classes: int, momentum: float | None = None) -> nn.Module:
    size = torch.Size(shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Linear(6, classes))


def test_a_model_that_no_engine_supports_is_rejected(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"engine": "batched", "model": {"kind": "corymb.tests.simulations.engine.test_engines:with_norm"}}
    with pytest.raises(ValueError, match="cannot train this model: the layer '2' is a BatchNorm with momentum = None"):
        resolve(Experiment(**{**SMALL, **changes}))
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert find_trainer("auto", lambda: with_norm((36,), 4), population([5, 6]).store) is None
    (line,) = caplog.messages
    assert line.startswith("Clients train one by one because the layer '2' is a BatchNorm with momentum = None")


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"epochs": 2, "batch_size": 10}},
        {"train": {"steps": 7, "batch_size": 8, "drop_last": True, **SCHEDULE}},
        {"train": {"epochs": 1, "optimizer": "Adam", "learning_rate": 0.01}},
        {"train": {"steps": 3, "batch_size": 16}, **CNN},
        {"train": {"steps": 3}, "model": {"kind": "mlp", "options": {"hidden": 9}, "random_start": True}},
        {"train": {"steps": 3}, "model": {"kind": f"{__name__}:with_norm", "options": {"momentum": 0.2}}},
        {"train": {"steps": 3}, "attack": {"kind": "sign_flip", "clients": 1}},
        {"train": {"steps": 3}, "attack": {"kind": "gaussian", "clients": 2}},
        {"train": {"steps": 3}, "rules": [{"name": "run_off", "parameters": {"groups": 3}}]},
        {"train": {"steps": 3}, "rules": ["median"]},
        {"train": {"steps": 3}, "rules": ["krum"]},
        {"train": {"steps": 3}, "rules": ["norm_clipping"]},
        {"train": {"steps": 3}, "rules": ["centred_clipping"]},
        {"train": {"steps": 3}, "rules": [{"name": "ida", "parameters": {"norm": 2}}]},
        {"train": {"steps": 3, "report_classes": True}},
    ],
    ids=str,
)
def test_a_federation_is_the_same_under_every_engine(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    models, verdicts, metrics = {}, {}, {}
    for engine in ("serial", "batched", "low_rank", "processes"):
        experiment = Experiment(**{**SMALL, **changes, "engine": engine})
        seen: list[Any] = []
        run_rule(experiment, 0, 0, tmp_path / engine, seen.append, workers=2)
        models[engine] = load_file(tmp_path / engine / "model-000003.safetensors")
        if (
            memory := tmp_path / engine / "state-000003.safetensors"
        ).is_file():  # the model of an election never changes
            models[engine] |= {f"memory {name}": tensor for name, tensor in load_file(memory).items()}
        verdicts[engine] = [[(v.node, v.code, v.examples) for v in record.verdicts] for record in seen]
        metrics[engine] = [record.train.get(kind) for record in seen for kind in ("loss", "accuracy", "steps")]
    for engine in ("batched", "low_rank", "processes"):
        assert verdicts["serial"] == verdicts[engine]
        assert metrics[engine] == pytest.approx(metrics["serial"], rel=1e-4)
        for name, tensor in models["serial"].items():
            torch.testing.assert_close(models[engine][name], tensor, rtol=1e-5, atol=1e-5)
    for name, tensor in models["low_rank"].items():
        assert torch.equal(models["processes"][name], tensor), "the result depends on which process trains a block"
    assert "the block failed" not in caplog.text  # the fallback would hide the failure


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    experiment = Experiment(**{**SMALL, "engine": "processes", "train": {"epochs": 1, "batch_size": 10}})
    models = []
    for workers in (1, 2, 3):
        run_rule(experiment, 0, 0, tmp_path / str(workers), workers=workers)
        models.append((tmp_path / str(workers) / "model-000003.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]


def wide(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4000), nn.BatchNorm1d(4000), nn.ReLU(), nn.Linear(4000, classes))


@pytest.mark.timeout(120)
def test_large_tasks_and_large_reports_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each of two tasks holds ten own starts, and each report ten buffers: more than a pipe has room for."""
    experiment = Experiment(
        name="wide", rounds=1, rules=["fedavg"], engine="processes", blocks=2,
        model={"kind": f"{__name__}:wide", "random_start": True}, partition={"kind": "iid", "clients": 20},
    )  # fmt: skip
    run_rule(experiment, 0, 0, tmp_path, workers=1)
    assert (tmp_path / "model-000001.safetensors").exists()


@pytest.mark.parametrize("engine", ["low_rank", "processes"])
def test_one_client_s_nan_data_do_not_affect_the_others(engine: str, tmp_path: Path) -> None:
    """A client with NaN in its data is rejected, and the model equals that of a round without it."""
    inputs = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 3, 60)
    offsets = np.arange(7) * 10
    models = []
    for broken in (False, True):
        train_inputs = inputs.copy()
        if broken:
            train_inputs[25] = np.nan
        np.savez(
            tmp_path / "data.npz", x_train=train_inputs, y_train=targets, x_test=inputs, y_test=targets, offsets=offsets
        )
        seen: list[Any] = []
        trace = tmp_path / "trace.csv"
        trace.write_text("1,1,1,1,1,1\n" if broken else "1,1,0,1,1,1\n")
        experiment = Experiment(
            name="broken", rounds=2, rules=["fedavg"], data={"source": str(tmp_path / "data.npz")},
            partition={"kind": "site"}, participation={"kind": "trace", "path": trace}, engine=engine,
            train={"epochs": 2, "batch_size": 4}, model={"kind": "mlp", "options": {"hidden": 6}},
        )  # fmt: skip
        run_rule(experiment, 0, 0, tmp_path / f"{engine}{broken}", seen.append, workers=2)
        codes = {verdict.node: verdict.code for verdict in seen[1].verdicts}
        assert codes.pop("client-2") == ("not-finite" if broken else "offline")
        assert set(codes.values()) == {"admitted"}
        models.append(load_file(tmp_path / f"{engine}{broken}/model-000002.safetensors"))
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_blocks_hold_each_client_once_and_little_padding(sizes: list[int]) -> None:
    blocks = cut_into_blocks(sizes, TrainSettings(epochs=1))
    assert sorted(index for block in blocks for index in block) == list(range(len(sizes)))
    for block in blocks:
        block_sizes = [sizes[index] for index in block]
        assert block_sizes == sorted(block_sizes, reverse=True)
        assert block_sizes[0] * len(block_sizes) <= MAX_PADDING * sum(block_sizes)


def test_a_model_that_uses_few_parameters_often_is_worth_several_blocks() -> None:
    rows = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 4))  # at each of 32 places
    assert work_of(rows, torch.zeros(2, 32, 64)) == 32 * (64 * 64 + 64 * 4)
    assert work_of(nn.Linear(64, 4), torch.zeros(2, 64)) == 65 * 4  # its parameters, as the bias takes part
    assert work_of(rows, torch.zeros(2, 7)) == 65 * 4  # it fails
    sizes = [100] * 10
    assert len(cut_into_blocks(sizes, TrainSettings(epochs=1), 260)) == 1
    assert len(cut_into_blocks(sizes, TrainSettings(epochs=1), 260, work=139_264)) == 4


def test_large_convolutions_train_one_by_one_where_that_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    images = Examples(torch.randn(10, 3, 32, 32), torch.arange(10))

    def small() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(294, 10))

    def large() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(25088, 10)
        )

    assert library_work(small(), images.inputs) == 28 * 28 * 6 * 3 * 25
    assert library_work(large(), images.inputs) == 30 * 30 * 32 * 3 * 9 + 28 * 28 * 32 * 32 * 9
    assert find_trainer("auto", small, images) is not None
    assert find_trainer("auto", large, images) is None
    assert "that is faster for a model with so large convolutions" in caplog.text
    assert find_trainer("processes", large, images) is not None
