"""Norm, embedding and recurrent layers train in blocks as they train alone, with buffers and for ragged clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from corymb.client import TrainSettings, train
from corymb.client.app import batch_generator
from corymb.client.batches import training_batches
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.client_layers import CLIENT_LAYERS
from corymb.simulations.engine.factory import find_trainer, make_engine
from corymb.simulations.engine.layers import ClientLayer, StepContext
from corymb.simulations.engine.program import Program
from corymb.strategies import Layout
from corymb.tests.simulations.engine.test_engines import (
    EXACT,
    SEARCH,
    SIZES,
    all_settings,
    differences,
    in_double,
    population,
)


class Squeeze(nn.Module):
    """Makes a sequence of rows from an image."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.squeeze(1)


class Sequence6(nn.Module):
    """Reads an image as six rows with the recurrent layer `body`, and uses outputs and last state as `use` says."""

    def __init__(self, body: nn.RNNBase, use: str) -> None:
        super().__init__()
        self.body, self.use = body, use
        size = body.hidden_size * (2 if body.bidirectional and use != "state" else 1)
        self.last = nn.Linear(size, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, state = self.body(inputs[:, 0])
        hidden = state[0] if isinstance(self.body, nn.LSTM) else state
        read = {"last": outputs[:, -1], "mean": outputs.mean(1), "state": hidden[-1]}[self.use]
        result: Tensor = self.last(read)
        return result


@st.composite
def norm_networks(draw: Any) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    affine = draw(st.booleans())
    norm: Callable[[int], nn.Module] = draw(
        st.sampled_from(
            [
                lambda c: nn.BatchNorm2d(c, affine=affine),
                lambda c: nn.BatchNorm2d(c, momentum=0.3, track_running_stats=affine),
                lambda c: nn.GroupNorm(2, c, affine=affine),
                lambda c: nn.LayerNorm([c, 6, 6], elementwise_affine=affine),
                lambda c: nn.LayerNorm(6),
            ]
        )
    )
    before = draw(st.sampled_from([nn.ReLU, nn.Tanh, lambda: nn.Dropout(0.2)]))
    # No bias before a batch norm: its gradient is rounding alone, which Adam would divide by its own size.
    layers = [nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4), nn.Tanh(), before(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(144, 4))


@st.composite
def recurrent_networks(draw: Any) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    kind: Any = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    options = {"nonlinearity": draw(st.sampled_from(["tanh", "relu"]))} if kind is nn.RNN else {}
    body = kind(
        6, draw(st.integers(1, 5)), draw(st.integers(1, 2)), bias=draw(st.booleans()), batch_first=True,
        bidirectional=draw(st.booleans()), **options,
    )  # fmt: skip
    return Sequence6(body, draw(st.sampled_from(["last", "mean", "state"])))


@SEARCH
@given(norm_networks(), all_settings(["SGD", "Adam"]), SIZES)
def test_norms_are_serial(module: nn.Module, train_settings: TrainSettings, sizes: list[int]) -> None:
    """With clients of different sizes, and batches of one example."""
    module, clients = in_double(module, population(sizes))
    assert max(differences(module, Program(module, clients), clients, train_settings)) < EXACT


@SEARCH
@given(recurrent_networks(), all_settings(["SGD", "Adam"]), SIZES)
def test_recurrent_layers_are_serial(module: nn.Module, train_settings: TrainSettings, sizes: list[int]) -> None:
    module, clients = in_double(module, population(sizes))
    assert max(differences(module, Program(module, clients), clients, train_settings)) < EXACT


class ChangedInPlace(nn.Module):
    """Changes the outputs of a recurrent layer in place."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.change, self.last = body, nn.ReLU(inplace=True), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.body(x[:, 0])
        scores: Tensor = self.last(self.change(outputs).flatten(1))
        return scores


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize(("sizes", "batch"), [([9], 4), ([9, 4, 12], 1), ([9, 4, 12], 4)])
def test_the_outputs_of_a_recurrent_layer_may_be_changed_in_place(kind: Any, sizes: list[int], batch: int) -> None:
    torch.manual_seed(0)
    module, clients = in_double(ChangedInPlace(kind(6, 5, batch_first=True)), population(sizes))
    settings = TrainSettings(batch_size=batch, epochs=2, learning_rate=0.1)
    assert max(differences(module, Program(module, clients), clients, settings)) < EXACT


def tokens(sizes: Sequence[int]) -> Population:
    generator = torch.Generator().manual_seed(1)
    clients = population(sizes, (1,))
    inputs = torch.randint(0, 11, (len(clients.store), 5), generator=generator)
    return replace(clients, store=Examples(inputs, clients.store.targets))


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("engine", ["auto", "processes"])
def test_a_language_model_trains_in_blocks_from_integers(padding: int | None, engine: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Embedding(11, 6, padding_idx=padding), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 4))

    clients = tokens([9, 4, 12, 1])
    maker = find_trainer("low_rank", model, clients.store)
    assert maker is not None
    trainer = maker(clients, torch.device("cpu"))
    settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.1, optimizer_options={"momentum": 0.9})
    assert max(differences(model(), trainer, clients, settings)) < 1e-5
    make_engine(engine, maker, clients, Layout.of_module(model()), 2).close()


def test_buffers_after_a_block_are_those_of_each_client() -> None:
    """Running statistics and the number of batches, which differ by client; also from a start of its own."""
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4))
    module, clients = in_double(module, population([9, 4, 12]))
    settings = TrainSettings(batch_size=4, epochs=2, learning_rate=0.1)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = Program(module, clients)
    order = [2, 0, 1]
    report = trainer.train(start, order, settings, 1).report
    own = {name: torch.stack([tensor] * 3) for name, tensor in start.items()}
    again = trainer.train(own, order, settings, 1, own_starts=True).report
    # Of nine examples, the last one joins the batch before it, as BatchNorm needs several.
    assert report.buffers["1.num_batches_tracked"].tolist() == [6, 4, 2]

    for row, client in enumerate(order):
        module.load_state_dict(start)
        data = torch.utils.data.TensorDataset(*clients.examples(client))
        train(module, training_batches(data, settings, batch_generator(settings.seed, client, 1), True), settings)
        for name, buffer in module.named_buffers():
            for result in (report, again):
                torch.testing.assert_close(torch.from_numpy(result.buffers[name])[row], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Sequence6(nn.GRU(6, 3), "last"), "the layer '1.body' is a GRU without batch_first"),
        (nn.Embedding(5, 3, max_norm=1.0), "the layer '1' is an Embedding with max_norm"),
        (nn.BatchNorm2d(1, momentum=None), "the layer '1' is a BatchNorm with momentum = None"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "the layer '1' is a Conv2d with .*'circular'"),
    ],
)
def test_a_layer_that_cannot_be_replaced_is_named(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Program(nn.Sequential(nn.Identity(), layer), population([4]))


class BatchState(nn.Module):
    """Takes the first example's state, which mixes the examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, state = self.body(inputs[:, 0])
        return self.last(outputs[:, -1] + state[:, 0])  # type: ignore[no-any-return]


def test_a_state_has_no_examples_in_front() -> None:
    with pytest.raises(ValueError, match="uses the state of the layer"):
        Program(BatchState(), population([4]))


class Scale(nn.Module):
    """A layer of a researcher's own: one factor per feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(features))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


class ClientScale(ClientLayer):
    """`Scale` for K clients."""

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        factor = parameters["factor"]
        by_client: Tensor = inputs.unflatten(0, (len(factor), -1))
        return (by_client * factor[:, None]).flatten(0, 1)


def test_a_layer_of_ones_own_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module: nn.Module = nn.Sequential(nn.Flatten(), Scale(36), nn.Linear(36, 4))
    module, clients = in_double(module, population([9, 4, 1]))
    with pytest.raises(ValueError, match="outside a layer"):
        Program(module, clients)
    monkeypatch.setitem(CLIENT_LAYERS, Scale, ClientScale)
    settings = TrainSettings(batch_size=4, learning_rate=0.1)
    assert max(differences(module, Program(module, clients), clients, settings)) < EXACT
    assert isinstance(ClientScale(Scale(2), StepContext()), nn.Module)


class Mixing(ClientScale):
    """Wrong: it adds the mean over all clients."""

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        scaled = super().run(inputs, **parameters)
        return scaled + 0.1 * scaled.mean(dim=0)


class Forgetful(ClientScale):
    """Wrong: it does not use its parameter."""

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        return inputs


@pytest.mark.parametrize("wrong", [Mixing, Forgetful])
def test_a_wrong_layer_of_ones_own_is_not_passed_over_in_silence(
    wrong: type[ClientLayer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(CLIENT_LAYERS, Scale, wrong)
    store = population([9, 4, 1]).store

    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), Scale(36), nn.Linear(36, 4))

    with pytest.raises(ValueError, match="the client layer of Scale fails: "):
        find_trainer("batched", model, store)
    assert find_trainer("auto", model, store) is not None
    assert "Clients are trained with torch.func, because the client layer of Scale fails: " in caplog.text
