"""What clients keep as factors over their examples is what they keep in full, and trains them in the same way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.client.algorithms.algorithm import Memory
from corymb.client.algorithms.memory_files import PLACE, folder_of, recall
from corymb.client.algorithms.scaffold import Scaffold
from corymb.client.app import client_identity
from corymb.protocol.flower import set_task_identity
from corymb.server import RoundRecord
from corymb.simulations import Examples
from corymb.simulations.data.population import Population
from corymb.simulations.engine.block_result import BlockResult
from corymb.simulations.engine.blocks import Task
from corymb.simulations.engine.coordinates import is_over_examples, written_out
from corymb.simulations.engine.gram_products import UseGram
from corymb.simulations.engine.kept import Kept, with_vectors_in_full
from corymb.simulations.engine.program import Program
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.folder import journal_folder, prepare
from corymb.simulations.results.runner import run_all
from corymb.strategies import Layout
from corymb.tests.simulations.engine.test_algorithms import assert_same, run, table_of

SIZES = [12, 9, 4, 1]
CLIENTS = tuple(range(len(SIZES)))


def population(scale: float = 1.0) -> Population:
    generator = torch.Generator().manual_seed(3)
    inputs = scale * torch.randn(sum(SIZES), 5, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (sum(SIZES),), generator=generator)
    return Population(Examples(inputs, targets), np.cumsum([0, *SIZES]))


def network(bias: bool) -> nn.Module:
    torch.manual_seed(4)
    layers = [nn.Flatten(), nn.Linear(30, 20, bias=bias), nn.Tanh(), nn.Linear(20, 4)]
    return nn.Sequential(*layers).double()


@dataclass
class Training:
    """Rounds of all clients in one block, with a rule's second vector that is noise."""

    folder: Path
    algorithm: str
    use_gram: UseGram = UseGram.ALWAYS
    bias: bool = True
    epochs: int = 2
    clients: Population = field(default_factory=population)

    def __post_init__(self) -> None:
        self.module = network(self.bias)
        self.layout = Layout.of_module(self.module)
        contexts = [self.context(client) for client in CLIENTS]
        self.folders = tuple(folder_of(context, client_identity(context)) for context in contexts)

    def context(self, client: int) -> Context:
        return Context(0, client, {"partition-id": client}, RecordDict(), {PLACE: str(self.folder)})

    def train_alone(self, client: int, number: int) -> None:
        """Do what happens before a client trains alone."""
        set_task_identity(run_id=1, node_id=1)
        content = RecordDict({"config": ConfigRecord({"server-round": number})})
        app = with_vectors_in_full(lambda message, context: message, self.clients, self.layout)
        app(Message(content, dst_node_id=client, message_type="train"), self.context(client))

    def round(self, number: int) -> BlockResult:
        settings = TrainSettings(batch_size=4, epochs=self.epochs, learning_rate=0.1, algorithm=self.algorithm)
        kept = Kept(settings, {}, self.folders, resumable=(number - 1,))
        trainer = Program(self.module, self.clients, use_gram=self.use_gram)
        generator = torch.Generator().manual_seed(number)
        start, second = torch.randn(2, self.layout.num_parameters, generator=generator, dtype=torch.float64) / 10
        task = Task(CLIENTS, CLIENTS, settings, number, kept=kept)
        sent = None if self.algorithm == "feddyn" else second
        return task.train(trainer, self.layout, self.layout.split(start), sent)

    def memories(self) -> list[Memory]:
        return [recall(folder, 9) for folder in self.folders]

    def in_full(self) -> list[Memory]:
        pairs = zip(CLIENTS, self.memories(), strict=True)
        return [written_out(memory, self.layout, self.clients, client) for client, memory in pairs]


def assert_close(result: BlockResult, expected: BlockResult, one: Training, other: Training) -> None:
    close: Any = {"rtol": 1e-9, "atol": 1e-11}
    models = result.models()
    torch.testing.assert_close(models, expected.models(), **close)
    weights = torch.tensor([0.4, 0.0, 0.5, -0.2], dtype=torch.float64)
    torch.testing.assert_close(result.weighted_update(weights), expected.weighted_update(weights), **close)
    for offset in (None, models[1] / 3):
        torch.testing.assert_close(result.squared_distances(offset), expected.squared_distances(offset), **close)
    assert (models.abs().amax(dim=1) <= torch.tensor(result.report.bounds) * 1.0001).all()
    for kept, wanted in zip(one.in_full(), other.in_full(), strict=True):
        torch.testing.assert_close(kept, wanted, **close)


@pytest.mark.parametrize("epochs", [1, 2])  # with one, the common part of the weights is written out in each step
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_factors_train_as_vectors_in_full(algorithm: str, bias: bool, epochs: int, tmp_path: Path) -> None:
    factors = Training(tmp_path / "factors", algorithm, bias=bias, epochs=epochs)
    full = Training(tmp_path / "full", algorithm, UseGram.NEVER, bias, epochs)
    for number in (1, 2, 3):
        assert_close(factors.round(number), full.round(number), factors, full)
    assert all(map(is_over_examples, factors.memories()))
    assert not any(map(is_over_examples, full.memories()))
    long, short = (sum(t.numel() for t in each.memories()[2].values()) for each in (full, factors))
    assert short < long


def test_a_block_with_a_client_that_keeps_vectors_in_full_keeps_them_all_in_full(tmp_path: Path) -> None:
    mixed, full = Training(tmp_path / "mixed", "scaffold"), Training(tmp_path / "full", "scaffold", UseGram.NEVER)
    for training in (mixed, full):
        training.round(1)
    mixed.train_alone(1, number=2)
    assert list(map(is_over_examples, mixed.memories())) == [True, False, True, True]
    for number in (2, 3):
        assert_close(mixed.round(number), full.round(number), mixed, full)
    assert not any(map(is_over_examples, mixed.memories()))


@pytest.mark.parametrize("use_gram", [UseGram.ALWAYS, UseGram.NEVER])
def test_factors_over_other_examples_are_refused(use_gram: UseGram, tmp_path: Path) -> None:
    Training(tmp_path, "scaffold").round(1)
    changed = Training(tmp_path, "scaffold", use_gram, clients=population(scale=1.001))
    with pytest.raises(ValueError, match="The examples of client 0 have changed"):
        changed.round(2)
    with pytest.raises(ValueError, match="The examples of client 3 have changed"):
        changed.train_alone(3, number=2)


@dataclass(frozen=True)
class KeepsTheReceived(Scaffold):
    keeps_gradients = True

    def remember(self, memory: Memory, received: Tensor | None, *rest: Any) -> Memory:
        return {"control": 0.5 * received.expand_as(rest[1])}  # type: ignore[union-attr]


def test_an_algorithm_that_keeps_more_than_gradients_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keeps more than gradients; set its keeps_gradients to False"):
        Training(tmp_path, f"{__name__}:KeepsTheReceived").round(1)
    whole = Training(tmp_path, f"{__name__}:KeepsTheReceived", UseGram.NEVER)
    whole.round(1)
    assert whole.memories()[0].keys() == {"control"}


def test_an_example_that_is_not_finite_fails_the_block(tmp_path: Path) -> None:
    inputs = population().store.inputs.clone()
    inputs[0, 0, 0] = torch.inf
    clients = replace(population(), store=Examples(inputs, population().store.targets))
    with pytest.raises(ValueError, match="an example of a client is not finite"):
        Training(tmp_path, "scaffold", clients=clients).round(1)


@dataclass(frozen=True)
class Clipped(Scaffold):
    """Is not linear, and does not say that it keeps gradients."""

    def remember(self, memory: Memory, *rest: Any) -> Memory:
        control = super().remember(memory, *rest)["control"]
        return {"control": control * (0.5 / control.norm(dim=-1, keepdim=True)).clamp(max=1.0)}


def test_a_subclass_has_to_say_again_that_it_keeps_gradients(tmp_path: Path) -> None:
    clipped = Training(tmp_path, f"{__name__}:Clipped")
    clipped.round(1)
    assert not any(map(is_over_examples, clipped.memories()))


def wide(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, outputs))


WIDE: dict[str, Any] = {
    "model": {"kind": f"{__name__}:wide"}, "partition": {"clients": 60, "kind": "iid"}, "fraction": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("engine", ["low_rank", "processes"])
def test_runs_use_factors_where_they_are_cheaper(engine: str, tmp_path: Path) -> None:
    rules = ["scaffold", "feddyn"]
    memories = assert_same(tmp_path, engine, rules=rules, only_models=True, **WIDE)[2]
    assert memories
    assert all(map(is_over_examples, memories))


def test_a_run_is_resumed_with_another_engine(tmp_path: Path) -> None:
    """It is stopped after two of three rounds, in which clients kept factors, and goes on one client after another."""
    table = {**WIDE, "rules": ["scaffold"], "fraction": 1.0, "seeds": 1}
    whole, folder = run("serial", tmp_path / "whole", **table)[1][0], tmp_path / "parts"
    begun = Experiment(**table_of("low_rank", **table))

    def stop(seed: int, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    prepare(begun, folder, False)
    with pytest.raises(KeyboardInterrupt):
        list(run_all([(resolve(begun), folder)], Console(quiet=True), on_round=stop))
    place = journal_folder(folder, begun.rules[0], 0)
    assert all(is_over_examples(recall(client, 9)) for client in (place / "clients").iterdir())
    list(run_all([(resolve(Experiment(**table_of("serial", **table))), folder)], Console(quiet=True)))
    torch.testing.assert_close(load_file(place / "model-000003.safetensors"), whole, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class FailsInABlock(Scaffold):
    """Fails in the third round of a block; when a client trains alone its vectors have one dimension."""

    keeps_gradients = True
    calls: ClassVar[list[int]] = []

    def correction(self, memory: Memory, received: Tensor | None) -> tuple[Tensor | None, float]:
        if any(each.dim() == 2 for each in memory.values()):
            self.calls.append(1)
            if len(self.calls) > 2:
                raise RuntimeError("no more")
        return super().correction(memory, received)


def test_clients_of_a_failed_block_train_alone_from_what_they_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FailsInABlock.calls.clear()
    rules = [{"name": "scaffold", "train": {"algorithm": f"{__name__}:FailsInABlock"}}]
    table = {**WIDE, "rules": rules, "fraction": 1.0, "blocks": 1, "train": {"batch_size": 4, "steps": 2}}
    assert_same(tmp_path, "low_rank", only_models=True, **table)
    assert "because the block failed: no more" in caplog.text
    assert len(FailsInABlock.calls) > 2
