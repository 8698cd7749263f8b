"""Client algorithms, personal layers, tasks and frozen parameters train in blocks as clients train alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from corymb.client.algorithms.memory_files import keep, recall
from corymb.server import RoundRecord
from corymb.simulations import Examples, Source
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.folder import FinishedRun, journal_folder, prepare
from corymb.simulations.results.runner import run_all

Found = tuple[list[FinishedRun], list[dict[str, Tensor]], list[dict[str, Tensor]]]


def numbers(kind: str, examples: int = 96) -> Any:
    """A data source: seven inputs, and targets of a kind of task."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(examples, 7, generator=generator)
    targets = {
        "regression": inputs.sum(dim=1) + torch.randn(examples, generator=generator),
        "binary": (inputs[:, 0] > 0).long(),
        "multilabel": (inputs[:, :3] > 0).long(),
        "quantile": inputs[:, 1],
    }[kind]
    strata = torch.arange(examples) % 3
    train, test = (Examples(inputs[s], targets[s], strata=strata[s]) for s in (slice(0, 72), slice(72, None)))
    return Source(train, test)


def sentences() -> Any:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 12, (60, 9), generator=generator)
    return Source(Examples(words[:48, :-1], words[:48, 1:]), Examples(words[48:, :-1], words[48:, 1:]))


class Speaker(nn.Module):
    """A next-token model with outputs `[B, T, V]`."""

    def __init__(self, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(outputs, 6), nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(tokens))
        scores: Tensor = self.head(hidden)
        return scores


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it (LoRA), whose first factor is frozen, too."""

    def __init__(self, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(64, outputs), nn.Linear(64, 2, bias=False), nn.Linear(2, outputs)
        for parameter in (*self.base.parameters(), *self.down.parameters()):
            parameter.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        flat = pixels.flatten(1)
        scores: Tensor = self.base(flat) + self.up(self.down(flat))
        return scores


def table_of(engine: str, **settings: Any) -> dict[str, Any]:
    return {
        "name": "t", "rounds": 3, "rules": ["fedavg"], "fraction": 0.6, "engine": engine,
        "partition": {"clients": 8, "kind": "iid"}, "train": {"batch_size": 4, "learning_rate": 0.05}, **settings,
    }  # fmt: skip


def run(engine: str, folder: Path, **settings: Any) -> Found:
    """Return the finished runs, their last models, and what all clients kept at the end."""
    experiment = Experiment(**table_of(engine, **settings))
    prepare(experiment, folder, False)
    (runs,) = run_all([(resolve(experiment), folder)], Console(quiet=True))
    places = [journal_folder(folder, rule, 0) for rule in experiment.rules]
    models = [load_file(place / "model-000003.safetensors") for place in places]
    kept = [recall(client, 9) for place in places for client in sorted((place / "clients").glob("*"))]
    return runs, models, kept


def test_a_resumed_run_forgets_what_clients_kept_in_rounds_that_are_lost(tmp_path: Path) -> None:
    """It is stopped after the first round; a client that sits out the second one must not read what it kept in it."""
    whole = run("serial", tmp_path / "whole", rules=["scaffold"])[1][0]
    experiment, folder = Experiment(**table_of("serial", rules=["scaffold"])), tmp_path / "parts"

    def stop(seed: int, record: RoundRecord) -> None:
        raise KeyboardInterrupt

    prepare(experiment, folder, False)
    with pytest.raises(KeyboardInterrupt):
        list(run_all([(resolve(experiment), folder)], Console(quiet=True), on_round=stop))
    place = journal_folder(folder, experiment.rules[0], 0)
    for client in (place / "clients").iterdir():
        keep(client, 2, {name: 100 * values for name, values in recall(client, 1).items()}, resumable=[1])
    list(run_all([(resolve(experiment), folder)], Console(quiet=True)))
    assert load_file(place / "model-000003.safetensors").keys() == whole.keys()
    for name, values in load_file(place / "model-000003.safetensors").items():
        assert torch.equal(values, whole[name])


def assert_same(tmp_path: Path, engine: str = "batched", only_models: bool = False, **settings: Any) -> Found:
    """Compare `engine` with training one by one: models, metrics and, unless `only_models`, what clients kept."""
    alone, together = (run(each, tmp_path / each, **settings) for each in ("serial", engine))
    kept = ([], []) if only_models else (alone[2], together[2])
    for one, two in zip((*alone[1], *kept[0]), (*together[1], *kept[1]), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    for first, second in zip(alone[0], together[0], strict=True):
        assert first.final == pytest.approx(second.final, rel=1e-4)
        for before, after in zip(first.records, second.records, strict=True):
            assert before.train.keys() == after.train.keys()
            assert before.train["loss"] == pytest.approx(after.train["loss"], rel=1e-4)
            assert before.train.get("accuracy") == pytest.approx(after.train.get("accuracy"))
    return together


MLP = {"kind": "mlp", "options": {"hidden": 12}}


@pytest.mark.parametrize("engine", ["batched", "processes"])
def test_algorithms(tmp_path: Path, engine: str) -> None:
    rules = ["scaffold", "feddyn", "fednova", "fedper", "local"]
    found = assert_same(tmp_path, engine, rules=rules, model=MLP, evaluate={"clients": True})
    assert found[2]


def test_personal_layers_with_a_control_variate(tmp_path: Path) -> None:
    train = {"personal": ["1.*"], "batch_size": 4, "epochs": 2, "optimizer_options": {"momentum": 0.5}}
    assert_same(tmp_path, rules=["scaffold"], model=MLP, evaluate={"clients": True}, train=train)


def normalised(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def test_fedbn(tmp_path: Path) -> None:
    found = assert_same(tmp_path, rules=["fedbn"], model={"kind": f"{__name__}:normalised"}, evaluate={"clients": True})
    assert set(found[1][0]) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert {name for kept in found[2] for name in kept} == {
        f"personal.2.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("kind", ["regression", "binary", "multilabel", "quantile"])
def test_tasks(tmp_path: Path, kind: str) -> None:
    data = {"source": f"{__name__}:numbers", "options": {"kind": kind}}
    assert_same(tmp_path, data=data, task={"kind": kind}, model=MLP)


def test_tokens(tmp_path: Path) -> None:
    data = {"source": f"{__name__}:sentences"}
    found = assert_same(tmp_path, data=data, task={"kind": "tokens"}, model={"kind": f"{__name__}:Speaker"})
    assert found[0][0].score.key == "perplexity"


class Reader(nn.Module):
    """Two layers of torch's transformer for next tokens, without dropout."""

    def __init__(self, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(outputs, 8), nn.Linear(8, outputs)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens)
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)
        scores: Tensor = self.head(self.body(hidden, mask=mask))
        return scores


def test_a_transformer(tmp_path: Path) -> None:
    data = {"source": f"{__name__}:sentences"}
    assert_same(tmp_path, data=data, task={"kind": "tokens"}, model={"kind": f"{__name__}:Reader"})


def test_a_frozen_base_does_not_travel(tmp_path: Path) -> None:
    found = assert_same(tmp_path, model={"kind": f"{__name__}:Adapted"})
    assert list(found[1][0]) == ["up.bias", "up.weight"]  # the adapters alone
    rng = np.random.default_rng(0)
    base, down = rng.normal(size=(5, 7)), rng.normal(size=(2, 7))  # with a frozen factor, the mean of the products
    ups, shares = rng.normal(size=(4, 5, 2)), np.array([0.1, 0.2, 0.3, 0.4])  # is the product of the means
    merged = np.tensordot(shares, [base + up @ down for up in ups], axes=1)
    np.testing.assert_allclose(merged, base + np.tensordot(shares, ups, axes=1) @ down, rtol=0, atol=1e-9)
