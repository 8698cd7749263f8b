"""Blocks trained from a recording are those trained directly.

Where there is no GPU, operations of torch are noted down and done again on the same memory, as a CUDA graph does; what
would have to wait for a GPU, or comes from Python's memory, raises as it does there. All memory stays as long as the
recording, which on a GPU is not so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.simulations.engine.test_engines import population
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from corymb.client import TrainSettings
from corymb.simulations.engine.cuda_graphs import MOST, REMEMBERED, CudaGraphs, Record, Recorder
from corymb.simulations.engine.program import Program
from corymb.strategies import Layout

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# As torch calls them outside inference mode, and in it; "resolve_conj" is how `tolist` and `numpy` begin.
WAITING = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_numpy", "_unique2", "masked_select",
    "repeat_interleave", "resolve_conj", "lift_fresh",
}  # fmt: skip


class Noted(TorchDispatchMode):
    """Notes every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool
            for arg in args
            if isinstance(arg, list)
            for each in arg
        )
        if name in WAITING or masks:
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


def emulated(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record as CUDA graphs would."""
    with Noted() as noted:
        result = work()
    return noted.replay, result


def recording(device: str) -> Record:
    return emulated if device == "cpu" else CudaGraphs(torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def no_failure_yet() -> Iterator[None]:
    """A recording that fails is the last of the process."""
    Recorder.has_failed = False
    yield
    Recorder.has_failed = False


def a_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 4),
    )  # fmt: skip


def an_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 200), nn.ReLU(), nn.Linear(200, 4))


@pytest.mark.parametrize("make", [a_cnn, an_mlp])
@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_trains_as_the_block_does_by_itself(
    make: Callable[[], nn.Module], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Among blocks of other kinds, and of those that are not recorded; all are read at the end."""
    torch.manual_seed(4)
    sizes = [12, 9, 4, 12, 10, 3, 5]
    module, people = make(), population(sizes)
    plain = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05)
    work: list[tuple[list[int], dict[str, Any]]] = [
        ([0, 1, 2], {}),  # batches of 4, 4, 4; 4, 4, 1; and 4
        ([3, 4, 5], {}),  # as many batches, of other lengths
        ([0, 6, 2], {}),  # as long, but for who ends when
        ([0, 1, 2], {"learning_rate": 0.1}),
        ([0, 1, 2], {"precision": "bfloat16"}),
        ([0, 1, 2], {"optimizer_options": {"momentum": 0.9}}),
        ([0, 1, 2], {"schedule": "ExponentialLR", "schedule_options": {"gamma": 0.9}}),
    ]
    directly, recorded = (Program(module, people, device=torch.device(device)) for _ in range(2))
    directly.recorder, recorded.recorder = None, Recorder(recording(device))
    for program in (directly, recorded):
        program._context.as_patches = True  # as on a GPU
    layout = Layout.of_module(module)
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    found, expected = [], []
    for number in range(1, 6):
        for block, changes in work:
            how = plain.model_copy(update=changes)
            found.append(recorded.train(layout.split(start), block, how, number))
            expected.append(directly.train(layout.split(start), block, how, number))
        own = torch.stack([start, start + 0.1, start - 0.1])
        found.append(recorded.train(layout.split(own), [0, 1, 2], plain, number, own=True))
        expected.append(directly.train(layout.split(own), [0, 1, 2], plain, number, own=True))
        start = start + expected[0].moved(torch.full((3,), 1 / 3))
    assert not caplog.records
    # The first two blocks are of one kind, whose second is recorded; of the next three each has to come twice.
    assert recorded.recorder.replayed == 4 * 2 + 3 * 3
    close = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-4}
    weights = torch.tensor([0.2, 0.0, 0.7])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.models(), theirs.models(), **close)
        torch.testing.assert_close(ours.moved(weights), theirs.moved(weights), **close)
        for one, other in zip(vars(ours.report).values(), vars(theirs.report).values(), strict=True):
            assert one == pytest.approx(other, rel=close["rtol"], abs=close["atol"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_takes_new_inputs(device: str) -> None:
    recorder = Recorder(recording(device))
    inputs = [torch.full((3,), float(number), device=device) for number in range(5)]
    found = [recorder.run("it", lambda tensor: tensor * 2, [each]) for each in inputs]
    assert [each.tolist() for each in found] == [[2.0 * number] * 3 for number in range(5)]
    assert recorder.replayed == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "waits",
    [
        lambda tensor: float(tensor.sum()),
        lambda tensor: sum(tensor.tolist()),
        lambda tensor: tensor[tensor > 0].sum(),
        lambda tensor: torch.tensor([2.0]).to(tensor.device)[0],
    ],
)
def test_what_cannot_be_recorded_goes_on_without(
    waits: Callable[[Tensor], Any], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), torch.inference_mode():  # as blocks are trained
        for _ in range(2):  # the second recorder knows what befell the first
            recorder = Recorder(recording(device))
            for _ in range(4):
                found = recorder.run("it", lambda tensor: tensor * waits(tensor), [torch.ones(2, device=device)])
                assert found.tolist() == [2.0, 2.0]
            assert recorder.replayed == 0
    assert ["No more CUDA graphs" in record.message for record in caplog.records] == [True]


def test_what_does_not_come_again_is_not_recorded() -> None:
    recorder = Recorder(emulated)

    def add(kind: int) -> None:
        recorder.run(kind, lambda tensor: tensor + 1, [torch.zeros(1)])

    for kind in [*range(REMEMBERED + 1), 0]:  # forgotten when it comes again
        add(kind)
    assert not recorder._recordings
    later = range(1000, 1000 + MOST + 1)
    for kind in later:
        add(kind)
        add(kind)
    for kind in [*range(2000, 2000 + 2 * REMEMBERED), *later[1:]]:  # what comes once pushes out no recording
        add(kind)
    assert recorder.replayed == MOST
    add(later[0])
    assert recorder.replayed == MOST
