"""A block trained from a CUDA graph equals the block trained directly.

Without a GPU a fake capture records torch's operations and repeats them on the same memory, as a CUDA graph does. It
raises an error, as CUDA does, for operations that would wait for the GPU or read Python's memory. Unlike a CUDA
graph, it keeps all intermediate memory.
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
from corymb.simulations.engine.cuda_graphs import MAX_GRAPHS, MAX_SEEN, Capture, CudaCapture, GraphRunner
from corymb.simulations.engine.program import Program
from corymb.strategies import Layout

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Operations that wait for the GPU, outside and in inference mode; `tolist` and `numpy` begin with "resolve_conj".
SYNCHRONISING = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "nonzero_numpy", "_unique2", "masked_select",
    "repeat_interleave", "resolve_conj", "lift_fresh",
}  # fmt: skip


class FakeGraph(TorchDispatchMode):
    """Records every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool
            for arg in args
            if isinstance(arg, list)
            for each in arg
        )
        if name in SYNCHRONISING or masks:
            raise RuntimeError(f"{function} is not permitted when a stream is capturing.")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, before in self.operations:
            again = function(*args, **kwargs)
            several = isinstance(again, (list, tuple))
            for old, new in zip(before, again, strict=True) if several else [(before, again)]:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def fake_capture(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture as `CudaCapture` does."""
    with FakeGraph() as graph:
        result = work()
    return graph.replay, result


def capture_on(device: str) -> Capture:
    return fake_capture if device == "cpu" else CudaCapture(torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def without_failed_captures() -> Iterator[None]:
    """Reset `has_failed`, because a failed capture disables all later ones in the process."""
    GraphRunner.has_failed = False
    yield
    GraphRunner.has_failed = False


def a_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 4),
    )  # fmt: skip


def an_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 200), nn.ReLU(), nn.Linear(200, 4))


@pytest.mark.parametrize("make", [a_cnn, an_mlp])
@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_trains_a_block_as_direct_training_does(
    make: Callable[[], nn.Module], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Among blocks of other kinds and blocks without a graph; all results are read at the end."""
    torch.manual_seed(4)
    sizes = [12, 9, 4, 12, 10, 3, 5]
    module, clients = make(), population(sizes)
    plain = TrainSettings(batch_size=4, epochs=2, learning_rate=0.05)
    work: list[tuple[list[int], dict[str, Any]]] = [
        ([0, 1, 2], {}),  # batches of 4, 4, 4; 4, 4, 1; and 4
        ([3, 4, 5], {}),  # the same number of batches, with other lengths
        ([0, 6, 2], {}),  # the same lengths, but other clients finish first
        ([0, 1, 2], {"learning_rate": 0.1}),
        ([0, 1, 2], {"precision": "bfloat16"}),
        ([0, 1, 2], {"optimizer_options": {"momentum": 0.9}}),
        ([0, 1, 2], {"schedule": "ExponentialLR", "schedule_options": {"gamma": 0.9}}),
    ]
    direct, from_graph = (Program(module, clients, device=torch.device(device)) for _ in range(2))
    direct.graphs, from_graph.graphs = None, GraphRunner(capture_on(device))
    for program in (direct, from_graph):
        program._context.use_patches = True  # as on a GPU
    layout = Layout.of_module(module)
    start = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    actual, expected = [], []
    for number in range(1, 6):
        for block, changes in work:
            settings = plain.model_copy(update=changes)
            actual.append(from_graph.train(layout.split(start), block, settings, number))
            expected.append(direct.train(layout.split(start), block, settings, number))
        own_starts = torch.stack([start, start + 0.1, start - 0.1])
        actual.append(from_graph.train(layout.split(own_starts), [0, 1, 2], plain, number, own_starts=True))
        expected.append(direct.train(layout.split(own_starts), [0, 1, 2], plain, number, own_starts=True))
        start = start + expected[0].weighted_update(torch.full((3,), 1 / 3))
    assert not caplog.records
    # The first two blocks are of one kind, captured at the second. Each of the next three is captured in round two.
    assert from_graph.graphs.replayed == 4 * 2 + 3 * 3
    close = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-4}
    weights = torch.tensor([0.2, 0.0, 0.7])
    for result, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(result.models(), reference.models(), **close)
        torch.testing.assert_close(result.weighted_update(weights), reference.weighted_update(weights), **close)
        for one, other in zip(vars(result.report).values(), vars(reference.report).values(), strict=True):
            assert one == pytest.approx(other, rel=close["rtol"], abs=close["atol"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_takes_new_inputs(device: str) -> None:
    runner = GraphRunner(capture_on(device))
    inputs = [torch.full((3,), float(number), device=device) for number in range(5)]
    results = [runner.run("double", lambda tensor: tensor * 2, [each]) for each in inputs]
    assert [each.tolist() for each in results] == [[2.0 * number] * 3 for number in range(5)]
    assert runner.replayed == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "synchronise",
    [
        lambda tensor: float(tensor.sum()),
        lambda tensor: sum(tensor.tolist()),
        lambda tensor: tensor[tensor > 0].sum(),
        lambda tensor: torch.tensor([2.0]).to(tensor.device)[0],
    ],
)
def test_work_that_cannot_be_captured_runs_without_a_graph(
    synchronise: Callable[[Tensor], Any], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), torch.inference_mode():  # as blocks are trained
        for _ in range(2):  # the failure of the first runner disables the second one too
            runner = GraphRunner(capture_on(device))
            for _ in range(4):
                result = runner.run(
                    "scale", lambda tensor: tensor * synchronise(tensor), [torch.ones(2, device=device)]
                )
                assert result.tolist() == [2.0, 2.0]
            assert runner.replayed == 0
    assert ["CUDA graphs are disabled" in record.message for record in caplog.records] == [True]


def test_work_that_does_not_repeat_is_not_captured() -> None:
    runner = GraphRunner(fake_capture)

    def add(kind: int) -> None:
        runner.run(kind, lambda tensor: tensor + 1, [torch.zeros(1)])

    for kind in [*range(MAX_SEEN + 1), 0]:  # kind 0 is forgotten before it repeats
        add(kind)
    assert not runner._graphs
    later = range(1000, 1000 + MAX_GRAPHS + 1)
    for kind in later:
        add(kind)
        add(kind)
    for kind in [*range(2000, 2000 + 2 * MAX_SEEN), *later[1:]]:  # work that runs once evicts no graph
        add(kind)
    assert runner.replayed == MAX_GRAPHS
    add(later[0])
    assert runner.replayed == MAX_GRAPHS
