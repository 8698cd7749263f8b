"""Clients trained together are those trained one by one: `serial` is the reference of every engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
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
from corymb.client.app import batch_generator, seed_of
from corymb.client.batches import training_batches
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine import frequencies
from corymb.simulations.engine import program as programs
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.blocks import PADDED, Task, cut
from corymb.simulations.engine.engine import OnDevices, Trainer, obstacle
from corymb.simulations.engine.factory import TrainerMaker, find_trainer, make_engine
from corymb.simulations.engine.gram_weights import GramWeights
from corymb.simulations.engine.low_rank import LowRank
from corymb.simulations.engine.program import Program, Static
from corymb.simulations.engine.vmapped import Vmapped
from corymb.simulations.engine.weight_forms import DenseWeights, WeightForm
from corymb.simulations.engine.workers import Workers
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


def maker_for(model: Callable[[], nn.Module], people: Population, engine: str = "low_rank") -> TrainerMaker:
    found = find_trainer(engine, model, people.store)
    assert found is not None
    return found


def trainer_for(model: Callable[[], nn.Module], people: Population) -> Trainer:
    return maker_for(model, people)(people, torch.device("cpu"))


def one_by_one(module: nn.Module, start: Tensor, people: Population, how: TrainSettings, number: int) -> Tensor:
    """Every client's model `[K, P]`, each trained by itself."""
    models = []
    for client in range(len(people)):
        nn.utils.vector_to_parameters(start.clone(), module.parameters())
        torch.default_generator.manual_seed(seed_of(how.seed, client, number))
        batches = training_batches(
            TensorDataset(*people.examples(client)), how, batch_generator(how.seed, client, number)
        )
        train(module, batches, how, server_round=number)
        models.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    return torch.stack(models)


def together(
    trainer: Any, layout: Layout, start: Tensor, people: Population, how: TrainSettings, number: int
) -> Tensor:
    models = torch.empty(len(people), len(start), dtype=start.dtype)
    for block in cut([people.size(client) for client in range(len(people))], how):
        trained = trainer.train(layout.split(start), block, how, number)
        models[block] = trained.models()
        weights = torch.rand(len(block), generator=torch.Generator().manual_seed(number), dtype=start.dtype)
        moved = weights @ (models[block] - start)
        torch.testing.assert_close(trained.moved(weights), moved, rtol=1e-4, atol=1e-5)
        for offset in (None, moved):
            direct = (models[block] - start - (0 if offset is None else offset)).double().square().sum(dim=1)
            close: Any = {"rtol": 1e-9, "atol": 1e-15} if start.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-9}
            torch.testing.assert_close(trained.squares(offset), direct, **close)
        assert (models[block].abs().amax(dim=1) <= torch.tensor(trained.report.bounds) * 1.0001).all()
    return models


def differences(
    module: nn.Module, trainer: Any, people: Population, how: TrainSettings, rounds: int = 5
) -> list[float]:
    """The relative difference of each parameter of the mean model, after some rounds of the engine and of `serial`."""
    layout = Layout.of_module(module)
    expected = found = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    for number in range(1, rounds + 1):
        following = one_by_one(module, expected, people, how, number).mean(dim=0)
        if not (following.abs() < 100).all():
            break  # training that diverges makes any rounding large
        expected, found = following, together(trainer, layout, found, people, how, number).mean(dim=0)
    pairs = zip(layout.split(found).values(), layout.split(expected).values(), strict=True)
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
def ways(draw: Any, optimizers: Sequence[str]) -> TrainSettings:
    """How clients train."""
    optimizer = draw(st.sampled_from(optimizers))
    length = draw(st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 4}, {"steps": 1}]))
    return TrainSettings(
        learning_rate=0.01 if optimizer == "SGD" else 0.005,  # at 0.05 some multiply rounding by 10^9
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


def in_double(module: nn.Module, people: Population) -> tuple[nn.Module, Population]:
    """In float32 a rectifier that is almost zero may be on here and off there, and Adam divides by next to nothing."""
    return module.double(), replace(people, store=replace(people.store, inputs=people.store.inputs.double()))


@SEARCH
@given(networks(), ways(["SGD"]), SIZES, st.sampled_from(["cheapest", "always", "static"]), st.booleans())
def test_factored_is_serial(
    module: nn.Module, how: TrainSettings, sizes: list[int], form: str, by_frequency: bool
) -> None:
    """Whichever layers are in factors: those where it pays, all linear ones, or the first over the examples."""
    module, people = in_double(module, population(sizes))
    trainer = Program(module, people, static=Static.ALWAYS if form == "static" else Static.CHEAPEST)
    with pytest.MonkeyPatch.context() as patch:
        if form == "always":
            patch.setattr(programs, "low_rank_is_cheaper", lambda *shape: True)
        if by_frequency:  # convolutions too, small as they are
            patch.setattr(frequencies, "WORTHWHILE", inf)
        assert max(differences(module, trainer, people, how)) < EXACT


@SEARCH
@given(networks(), ways(["SGD", "Adam", "RMSprop"]), SIZES)
def test_batched_is_serial(module: nn.Module, how: TrainSettings, sizes: list[int]) -> None:
    module, people = in_double(module, population(sizes))
    assert max(differences(module, Program(module, people, low_rank=False), people, how)) < EXACT


class Branching(nn.Module):
    """No sequence; it changes outputs in place, and pools what has gaps in memory."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.on, self.last = nn.ReLU(inplace=True), nn.Linear(12, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.on(self.second(self.on(self.first(inputs))))
        return self.last(nn.functional.max_pool2d(found[..., 1:-1, 1:-1], 2).flatten(1))  # type: ignore[no-any-return]


class Crop(nn.Module):
    """A view of what lies inside."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[..., 1:-1, 1:-1]


class TanhPool(nn.MaxPool2d):
    """Pooling whose outputs are kept by somebody."""

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
def test_modules_that_use_their_memory_oddly(module: nn.Module) -> None:
    if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Conv2d):
        module = nn.Sequential(*module, nn.Flatten())
    module, people = in_double(module, population([9, 4, 12, 1]))
    how = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, Program(module, people), people, how)) < EXACT


def test_convolutions_through_frequencies_are_serial_in_float32() -> None:
    """Layers of a size for which that is chosen, on the way to another convolution."""
    torch.manual_seed(4)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    people = population([12, 10, 7])
    trainer = Program(module, people)
    how = TrainSettings(batch_size=10, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, trainer, people, how)) < CLOSE
    ways = [way for layer in trainer._layers.values() for way in getattr(layer, "_ways", {}).values()]
    assert any(isinstance(way, frequencies.Frequencies) for way in ways)


@pytest.mark.parametrize(
    "how",
    [{}, {"stride": 2}, {"padding": 2}, {"dilation": 2, "padding": (1, 2)}, {"stride": (1, 2), "bias": False}],
    ids=str,
)
def test_convolutions_as_products_of_matrices(how: dict[str, Any]) -> None:
    """The way of a GPU, here on the CPU."""
    torch.manual_seed(4)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, **how), nn.Flatten(), nn.LazyLinear(4)
    )
    module(torch.zeros(1, 1, 6, 6))
    module, people = in_double(module, population([9, 4, 12, 1]))
    trainer = Program(module, people)
    trainer._context.as_patches = True
    settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, trainer, people, settings)) < EXACT


@pytest.mark.parametrize("options", LINEAR, ids=str)
@pytest.mark.parametrize("low_rank", [True, False])
def test_in_float32_they_are_close(options: dict[str, Any], low_rank: bool) -> None:
    torch.manual_seed(3)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(27, 40), nn.Tanh(), nn.Linear(40, 4),
    )  # fmt: skip
    how = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options=options)
    people = population([9, 4, 12, 1])
    assert max(differences(module, Program(module, people, low_rank), people, how)) < CLOSE


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 0.0])
def test_lengths_of_factors_are_right(scale: float, spread: float) -> None:
    """Also where inputs are nearly the same, so that most of it cancels out, and where float32 has no squares."""
    torch.manual_seed(0)
    start, bias = scale * torch.randn(5, 30), torch.randn(5)
    inputs = torch.randn(30) + spread * torch.randn(3, 8, 30)
    slopes = scale * torch.randn(3, 8, 5)
    rows = torch.arange(8).expand(1, 3, 8)
    first = GramWeights(start, bias, list(inputs), inputs @ inputs.mT, rows, True)
    forms: list[WeightForm] = [first, LowRank(start, bias, 3, 8, True), DenseWeights(start, 3)]
    offset = scale * torch.randn(5, 30)
    for form in forms:
        form.outputs(inputs)
        form.learn(slopes, inputs, 0.1)
        update = -0.1 * slopes.double().mT @ inputs.double()
        for direct, found in ((update, form.squares(None)), (update - offset, form.squares(offset.flatten()))):
            torch.testing.assert_close(found, direct.square().sum(dim=(1, 2)), rtol=1e-5, atol=0)


class Odd(nn.Module):
    """What no sequence does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 20), nn.Linear(20, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        far = 1000 + inputs.flatten(1)  # of which bfloat16 would leave little
        outputs: Tensor = self.last(self.first(far - 1000).tanh())
        return outputs


@pytest.mark.parametrize("options", LINEAR[:2], ids=str)
@pytest.mark.parametrize("is_sequence", [True, False])
def test_bfloat16_is_used_as_serial_uses_it(options: dict[str, Any], is_sequence: bool) -> None:
    """Of smooth layers: a rectifier that is almost zero would be on here and off there. One step in 256 is one bit."""
    torch.manual_seed(3)
    smooth = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 3),
        nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4),
    )  # fmt: skip
    module: nn.Module = smooth if is_sequence else Odd()
    people = population([12, 9, 4, 1])
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    how = TrainSettings(
        batch_size=4, epochs=2, learning_rate=0.05, optimizer_options=options, precision="bfloat16", device="cpu"
    )
    assert obstacle(how, torch.device("cpu"))  # where it is slower than float32
    trainer = Program(deepcopy(module), people)
    trainer._context.as_patches = True  # as on a GPU
    found = trainer.train(Layout.of_module(module).split(start), range(4), how, 1).models()
    whole = one_by_one(module, start, people, how.model_copy(update={"precision": "float32"}), 1)
    half = one_by_one(module, start, people, how, 1)
    assert (found - half).norm() < 0.01 * (half - start).norm()
    assert (found - whole).norm() > 0.001 * (whole - start).norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_on_each_device_they_are_close(device: str) -> None:
    torch.manual_seed(3)
    module: nn.Module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 40), nn.ReLU(),
        nn.Linear(40, 4),
    )  # fmt: skip
    module, people = in_double(module, population([9, 4, 12, 1]))
    trainer = Program(module, people, device=torch.device(device))
    how = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options={"momentum": 0.9})
    assert max(differences(module, trainer, people, how)) < EXACT


def test_a_wrong_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation check of the two tests above: with a mask an example too long, or too short, they fail.

    The mistake is injected into what `Batches.drawn` returns, so that it is made anew in every run of the tests.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
    people, how = population([7, 12, 3]), TrainSettings(batch_size=5, epochs=2)
    right = Batches.drawn
    for shift in (1, -1):

        def wrong(*arguments: Any, shift: int = shift) -> Batches:
            batches = right(*arguments)
            lengths = (batches.weights > 0).sum(dim=2, keepdim=True)
            there = (torch.arange(batches.weights.shape[2]) < lengths + shift) & (lengths > 0)
            return Batches(batches.rows, there / lengths.clamp(min=1), batches.steps)

        for low_rank in (True, False):
            trainer = Program(module, people, low_rank)
            monkeypatch.setattr(Batches, "drawn", right)
            assert max(differences(module, trainer, people, how, rounds=1)) < CLOSE
            monkeypatch.setattr(Batches, "drawn", wrong)
            assert max(differences(module, trainer, people, how, rounds=1)) > 10 * CLOSE


class Scaled(nn.Module):
    """Has a parameter of its own, which only torch's vectorisation can give every client."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs.flatten(1) * self.scale)
        return outputs


def test_any_module_of_parameters_is_vectorised() -> None:
    people = population([9, 4, 12])
    torch.manual_seed(1)
    module = Scaled()
    trainer = trainer_for(lambda: module, people)
    assert isinstance(trainer, Vmapped)
    for options in LINEAR:
        how = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, optimizer_options=options)
        assert max(differences(module, trainer, people, how)) < CLOSE


class Residual(nn.Module):
    """Looks at its input twice, so the first layer must not stand on the examples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        outputs: Tensor = self.last(torch.relu(self.first(flat)) + flat)
        return outputs


def test_a_first_layer_that_is_not_alone_with_the_input() -> None:
    people = population([9, 4])
    torch.manual_seed(1)
    module = Residual()
    trainer = trainer_for(lambda: module, people)
    assert isinstance(trainer, Program)
    assert trainer._first is None
    assert max(differences(module, trainer, people, TrainSettings(batch_size=4, epochs=1))) < CLOSE


class Clamped(nn.Module):
    """Does nothing to small examples, and something to large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs.flatten(1).clamp(-5, 5))
        return outputs


class Twice(nn.Module):
    """Uses a layer twice, so that it would learn between its two ways back."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last = nn.Linear(36, 36), nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        outputs: Tensor = self.last(flat + 0.03 * torch.tanh(self.middle(torch.tanh(self.middle(flat)))))
        return outputs


def positive_first(shape: tuple[int, ...] = (), classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(36, 4))


@pytest.mark.parametrize("make", [Clamped, Twice, positive_first, lambda: nn.Sequential(nn.Flatten(), Inner())])
def test_what_a_module_s_own_code_does_is_done(make: Any) -> None:
    people = population([9, 4])
    people.store.inputs[:6].abs_().clamp_(max=1)  # on which the code would not show
    people.store.inputs[6:].mul_(4)
    torch.manual_seed(1)
    module = make()
    trainer = trainer_for(lambda: module, people)
    for options in LINEAR:
        how = TrainSettings(batch_size=4, epochs=1, learning_rate=0.01, optimizer_options=options)
        assert max(differences(module, trainer, people, how, rounds=2)) < CLOSE


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs)
        return outputs


def test_one_broken_example_does_not_refuse_the_engine() -> None:
    people = population([9, 4])
    people.store.inputs[0] = torch.nan
    assert isinstance(trainer_for(linear, people), Program)


def test_blocks_outlive_their_round() -> None:
    """Models that a rule keeps, sums that nobody reads, and many sums at once."""
    people = population([5] * 12)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    layout = Layout.of_module(module)
    engines = [make_engine(name, maker_for(linear, people), people, layout, 2) for name in ("low_rank", "processes")]
    pair = [trainer_for(linear, people) for _ in range(2)]
    engines.append(OnDevices(pair, layout))
    how = TrainSettings(batch_size=5, epochs=1)
    start = torch.zeros(layout.num_parameters)
    found = []
    for engine in engines:
        tasks = [Task((client,), (client,), how, 1) for client in range(12)]
        blocks: list[Any] = [block for _, block, _ in engine.train(tasks, start)]
        later = engine.train([Task((0,), (0,), how, 2)], start + 1)
        sums = torch.zeros(len(blocks), len(start), dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        added = [b.add_to(total, one, start) for b, total in zip(blocks, sums, strict=True)]  # more than have room
        models = [torch.cat(list(block.pieces(0))) for block in blocks[::-1]][::-1]
        next(later)
        far = [block.squared_distances(start + 1) for block in blocks]
        rows = torch.empty(len(blocks), len(start))
        written = [block.copy_to([(0, row)]) for block, row in zip(blocks, rows, strict=True)]  # one at a time has room
        for finish in written:
            finish()
        torch.testing.assert_close(rows, torch.stack(models), rtol=0, atol=0)
        found_far = torch.cat([squares() for squares in far])
        torch.testing.assert_close(found_far, (rows - 1).double().square().sum(dim=1), rtol=1e-5, atol=0)
        unread = [block.add_to(torch.zeros_like(sums[0]), one, start) for block in blocks[:2]]
        for finish in added:
            finish()
        found.append((sums, torch.stack(models)))
        del unread
        ((_, block, _),) = engine.train([Task((0,), (0,), how, 3)], start)  # sums that nobody read are in nobody's way
        assert not isinstance(block, Exception)
        engine.close()
    for others in found[1:]:
        for mine, theirs in zip(found[0], others, strict=True):
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-6, atol=1e-7)


def test_a_worker_that_dies_is_told() -> None:
    people = population([5] * 8)
    layout = Layout.of_module(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    engine = make_engine("processes", maker_for(linear, people), people, layout, 2)
    assert isinstance(engine, Workers)
    engine._workers[0].process.kill()
    engine._workers[0].process.join()
    tasks = [Task((client,), (client,), TrainSettings(epochs=1), 1) for client in range(8)]
    with pytest.raises(ChildProcessError, match="A worker process has died"):
        list(engine.train(tasks, torch.zeros(layout.num_parameters)))
    engine.close()


class Mixing(nn.Linear):
    """Subtracts the mean of the batch, which is another when clients are trained together."""

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
    """Mixes with a weight that is zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.share = nn.Linear(36, 4), nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(inputs.flatten(1))
        return outputs + self.share * outputs.mean(dim=0)


def test_a_module_that_mixes_its_batch_trains_by_itself() -> None:
    for make in (Mixing, MixingInside, MixingAtLast):
        with pytest.raises(ValueError, match="its code mixes the examples of a batch"):
            trainer_for(make, population([5, 6]))


def test_hooks_of_parameters_train_by_themselves() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    next(module.parameters()).register_hook(lambda slopes: slopes.clamp(-100, 100))  # of which a trial shows nothing
    with pytest.raises(ValueError, match="its parameters have hooks"):
        trainer_for(lambda: module, population([5, 6]))


class Gated(nn.Module):
    """Looks at the examples beside its first layer, which shows on few of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(36, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        gate = (flat.mean(1, keepdim=True) > 1).float()
        found = torch.relu(self.first(flat))
        outputs: Tensor = gate * self.one(found) + (1 - gate) * self.other(found)
        return outputs


class Unlike(nn.Module):
    """With what cannot be copied, a dropout that is no layer, and seldom shows."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        found = torch.relu(self.first(inputs.view(inputs.size(0), -1)))
        outputs: Tensor = self.last(nn.functional.dropout(found, 0.01, self.training))
        return outputs


@pytest.mark.parametrize("make", [Gated, Unlike])
def test_what_a_trial_would_not_show_is_known(make: Any) -> None:
    people = population([30, 4, 60])
    people.store.inputs[::2] += 2
    torch.manual_seed(1)
    module = make()
    trainer = trainer_for(lambda: module, people)
    assert isinstance(trainer, Program)
    how = TrainSettings(batch_size=5, epochs=2, learning_rate=0.05)
    assert max(differences(module, trainer, people, how)) < CLOSE


def tied(shape: tuple[int, ...], classes: int) -> nn.Module:
    first, second = nn.Linear(torch.Size(shape).numel(), 8), nn.Linear(8, 8)
    third = nn.Linear(8, 8)
    third.weight = second.weight
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), third, nn.Tanh(), nn.Linear(8, classes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"kind": "corymb.tests.simulations.engine.test_engines:tied"}}, "share their parameters"),
        ({"train": {"optimizer": "Adafactor"}}, "one after another, as Adafactor does not"),
        ({"train": {"precision": "bfloat16"}}, "one after another, as precision = 'bfloat16' is not"),
        ({"train": {"learning_rate": 1e38, "epochs": 2}}, "Not one reply was admitted, so the model is the one at"),
    ],
)
def test_what_is_unlike_others_is_told_once(
    changes: dict[str, Any],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    small = Experiment(**{**SMALL, **changes})
    with caplog.at_level(logging.WARNING):
        run_rule(small, 0, 0, tmp_path)
    assert [told in line for line in caplog.messages].count(True) == 1


def test_an_example_without_numbers_reaches_those_only_who_draw_it() -> None:
    people, how = population([40, 30]), TrainSettings(batch_size=4, steps=2)
    people.store.inputs[7] = torch.nan
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    trainer = Program(module, people, static=Static.ALWAYS)
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    layout = Layout.of_module(module)
    drew = []
    for number in range(1, 9):
        expected = one_by_one(module, start, people, how, number)
        found = trainer.train(layout.split(start), range(2), how, number).models()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
        drew.append(bool(expected.isnan().any()))
    assert set(drew) == {True, False}


@pytest.mark.parametrize("end", [[nn.Conv2d(4, 4, 4)], [nn.Conv2d(4, 4, 2), nn.ReLU(), nn.MaxPool2d(3)]])
def test_what_clients_tell_is_right_where_a_convolution_comes_last(end: list[nn.Module]) -> None:
    """It uses its memory again in the next step."""
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), *end, nn.Flatten())
    people, how = population([9, 4]), TrainSettings(batch_size=4, epochs=2)
    trainer = trainer_for(lambda: deepcopy(module), people)
    assert isinstance(trainer, Program)
    start = dict(module.named_parameters())
    report = trainer.train({name: tensor.detach() for name, tensor in start.items()}, range(2), how, 1).report
    for client in range(2):
        batches = training_batches(TensorDataset(*people.examples(client)), how, batch_generator(how.seed, client, 1))
        told = train(deepcopy(module), batches, how)
        assert report.losses[client] / report.examples[client] == pytest.approx(told["loss"], rel=1e-5)
        assert report.correct[client] / report.examples[client] == pytest.approx(told["accuracy"])


def with_norm(shape: tuple[int, ...], classes: int) -> nn.Module:
    size = torch.Size(shape).numel()
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size), nn.Linear(size, classes))


def test_what_it_cannot_train_is_refused(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"engine": "batched", "model": {"kind": "corymb.tests.simulations.engine.test_engines:with_norm"}}
    with pytest.raises(ValueError, match="cannot train this model: the layer '1' is a BatchNorm1d"):
        resolve(Experiment(**{**SMALL, **changes}))
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert find_trainer("auto", lambda: with_norm((36,), 4), population([5, 6]).store) is None
    assert caplog.messages == ["Clients are trained one after another, as the layer '1' is a BatchNorm1d."]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"epochs": 2, "batch_size": 10}},
        {"train": {"steps": 7, "batch_size": 8, "drop_last": True, **SCHEDULE}},
        {"train": {"epochs": 1, "optimizer": "Adam", "learning_rate": 0.01}},
        {"train": {"steps": 3, "batch_size": 16}, **CNN},
        {"train": {"steps": 3}, "model": {"kind": "mlp", "options": {"hidden": 9}, "random_start": True}},
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
    models, records, told = {}, {}, {}
    for engine in ("serial", "batched", "low_rank", "processes"):
        experiment = Experiment(**{**SMALL, **changes, "engine": engine})
        seen: list[Any] = []
        run_rule(experiment, 0, 0, tmp_path / engine, seen.append, workers=2)
        models[engine] = load_file(tmp_path / engine / "model-000003.safetensors")
        if (memory := tmp_path / engine / "state-000003.safetensors").is_file():  # an election's model never changes
            models[engine] |= {f"memory {name}": tensor for name, tensor in load_file(memory).items()}
        records[engine] = [[(v.node, v.code, v.examples) for v in record.verdicts] for record in seen]
        told[engine] = [record.train.get(kind) for record in seen for kind in ("loss", "accuracy", "steps")]
    for engine in ("batched", "low_rank", "processes"):
        assert records["serial"] == records[engine]
        assert told[engine] == pytest.approx(told["serial"], rel=1e-4)
        for name, tensor in models["serial"].items():
            torch.testing.assert_close(models[engine][name], tensor, rtol=1e-5, atol=1e-5)
    for name, tensor in models["low_rank"].items():
        assert torch.equal(models["processes"][name], tensor), "it matters who trains a block"
    assert "as it failed" not in caplog.text  # which would hide behind clients that train by themselves


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    experiment = Experiment(**{**SMALL, "engine": "processes", "train": {"epochs": 1, "batch_size": 10}})
    models = []
    for workers in (1, 2, 3):
        run_rule(experiment, 0, 0, tmp_path / str(workers), workers=workers)
        models.append((tmp_path / str(workers) / "model-000003.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize("engine", ["low_rank", "processes"])
def test_one_client_s_broken_data_cost_nobody_else(engine: str, tmp_path: Path) -> None:
    """A client whose numbers are no numbers is turned away; the others' model is what it is without it."""
    inputs = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 3, 60)
    offsets = np.arange(7) * 10
    models = []
    for broken in (False, True):
        mine = inputs.copy()
        if broken:
            mine[25] = np.nan
        np.savez(tmp_path / "data.npz", x_train=mine, y_train=targets, x_test=inputs, y_test=targets, offsets=offsets)
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
        assert codes.pop("client-2") == ("not finite" if broken else "offline")
        assert set(codes.values()) == {"admitted"}
        models.append(load_file(tmp_path / f"{engine}{broken}/model-000002.safetensors"))
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_blocks_hold_everybody_once_and_little_padding(sizes: list[int]) -> None:
    blocks = cut(sizes, TrainSettings(epochs=1))
    assert sorted(place for block in blocks for place in block) == list(range(len(sizes)))
    for block in blocks:
        mine = [sizes[place] for place in block]
        assert mine == sorted(mine, reverse=True)
        assert mine[0] * len(mine) <= PADDED * sum(mine)
