"""Blocks trained from a recording are those trained directly.

Where there is no GPU, operations of torch are noted down and done again on the same memory, as a CUDA graph does; what
would have to wait for a GPU, or comes from Python's memory, raises as it does there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.simulations.test_engines import population
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from corymb.client import TrainSettings
from corymb.simulations.engine.program import Program
from corymb.simulations.engine.recorded import MOST, CudaGraphs, Recorder
from corymb.strategies import Layout

WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "lift_fresh", "_unique2", "masked_select"}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Noted(TorchDispatchMode):
    """Notes every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.removeprefix("aten::") in WAITING:
            raise RuntimeError(f"{function} is not permitted when a stream is capturing.")
        result = function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, before in self.noted:
            again = function(*args, **kwargs)
            several = isinstance(again, (list, tuple))
            for old, new in zip(before, again, strict=True) if several else [(before, again)]:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Emulated:
    """Records as CUDA graphs would."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Noted() as noted:
            result = work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            noted.replay()

        return replay, result


def a_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 4),
    )  # fmt: skip


def an_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 200), nn.ReLU(), nn.Linear(200, 4))


@pytest.mark.parametrize("make", [a_cnn, an_mlp])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_trains_as_the_block_does_by_itself(
    make: Callable[[], nn.Module], precision: str, device: str
) -> None:
    torch.manual_seed(4)
    module, people = make(), population([12, 9, 9, 4, 4, 1])
    how = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05, precision=precision)
    directly, recorded = (Program(module, people, device=torch.device(device)) for _ in range(2))
    emulated = Emulated()
    directly.recorder = None
    if device == "cpu":
        recorded.recorder = Recorder(emulated)
        for program in (directly, recorded):
            program._now.as_patches = True  # as on a GPU
    layout = Layout.of_module(module)
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    kept, expected = [], []
    for number in range(1, 6):
        for block in ([0, 1, 2], [3, 4, 5], [0, 2, 1]):  # the first and the last are of one kind
            state = layout.split(start)
            kept.append(recorded.train(state, block, how, number))
            expected.append(directly.train(state, block, how, number))
        start = start + expected[-1].moved(torch.full((3,), 1 / 3))
    if device == "cpu":
        assert (emulated.recorded, emulated.replayed) == (2, 8 + 3)
    weights = torch.tensor([0.2, 0.0, 0.7])
    for found, right in zip(kept, expected, strict=True):  # all of them are still what they were
        assert found.report == right.report
        torch.testing.assert_close(found.models(), right.models(), rtol=0, atol=0 if device == "cpu" else 1e-5)
        torch.testing.assert_close(found.moved(weights), right.moved(weights))


def test_what_cannot_be_recorded_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(Emulated())

    def work(tensor: Tensor) -> Tensor:
        return tensor * float(tensor.sum())

    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert recorder.run("it", work, [torch.ones(2)]).tolist() == [2.0, 2.0]
    assert len(caplog.records) == 1
    assert "without CUDA graphs" in caplog.text


def test_what_does_not_come_again_is_not_recorded() -> None:
    emulated = Emulated()
    recorder = Recorder(emulated)
    for _ in range(2):
        for kind in range(MOST + 1):
            recorder.run(kind, lambda tensor: tensor + 1, [torch.zeros(1)])
    assert emulated.recorded == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_takes_new_inputs(device: str) -> None:
    recorder = Recorder(Emulated() if device == "cpu" else CudaGraphs(torch.device("cuda", 0)))
    inputs = [torch.full((3,), float(number), device=device) for number in range(5)]
    found = [recorder.run("it", lambda tensor: tensor * 2, [each]) for each in inputs]
    assert [each.tolist() for each in found] == [[2.0 * number] * 3 for number in range(5)]
