from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from corymb.strategies import FedAvg, Layout, Median, Reply
from corymb.strategies.core.layout import Model, Role

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    state = {}
    for i in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        name = draw(st.sampled_from(("weight", "running_mean", "running_var", "num_batches_tracked")))
        values = torch.randn(shape, generator=generator) * 8
        state[f"layer{i}.{name}"] = values.abs().to(draw(st.sampled_from(DTYPES)))
    return state


@given(states())
def test_a_state_dict_comes_back_exactly(state: dict[str, Tensor]) -> None:
    layout = Layout.of(state)
    model = layout.flatten(state)
    assert model.parameters.dtype == torch.float32
    assert len(model.parameters) == layout.num_parameters
    restored = layout.restore(model)
    assert list(restored) == list(state)
    for name, tensor in state.items():
        assert restored[name].dtype == tensor.dtype
        assert torch.equal(restored[name], tensor)


def test_roles() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    module.register_buffer("scale", torch.ones(1))
    by_name, by_module = Layout.of(module.state_dict()), Layout.of_module(module)
    assert [e.name for e in by_module.buffers] == ["scale", "1.running_mean", "1.running_var"]
    assert [e.name for e in by_name.buffers] == ["1.running_mean", "1.running_var"]
    assert next(e.role for e in by_name.entries if e.name == "1.num_batches_tracked") is Role.INTEGER


def test_a_float64_model_stays_float64() -> None:
    state = {"w": torch.tensor([1 / 3], dtype=torch.float64)}
    layout = Layout.of(state)
    assert torch.equal(layout.restore(layout.flatten(state))["w"], state["w"])


def test_split_gives_each_parameter_its_view() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    layout = Layout.of(state)
    rows = torch.arange(20.0).reshape(2, 10)
    parts = layout.split(rows)
    assert parts["a"].shape == (2, 2, 3)
    assert parts["b"].tolist() == [[6, 7, 8, 9], [16, 17, 18, 19]]
    parts["b"][0, 0] = -1
    assert rows[0, 6] == -1


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'w' has dtype torch\.complex64"):
        Layout.of({"w": torch.zeros(1, dtype=torch.complex64)})


def model_with_variance(variance: float) -> Model:
    state = {"w": torch.zeros(1), "running_var": torch.tensor([variance])}
    return Layout.of(state).flatten(state)


def test_buffers_are_averaged_by_examples_and_variances_are_not_negative() -> None:
    origin = model_with_variance(1.0)
    replies = [
        Reply.of("a", torch.zeros(1), 1, buffers=torch.tensor([3.0])),
        Reply.of("b", torch.zeros(1), 3, buffers=torch.tensor([-5.0])),
    ]
    assert FedAvg().aggregate(origin, replies[:1], None).model.buffers.tolist() == [3.0]
    assert FedAvg().aggregate(origin, replies, None).model.buffers.tolist() == [0.0]


def test_a_robust_rule_is_robust_in_its_buffers_too() -> None:
    origin = model_with_variance(1.0)
    replies = [
        Reply.of(f"site-{i}", torch.zeros(1), buffers=torch.tensor([value])) for i, value in enumerate((1.0, 2.0, 1e30))
    ]
    assert Median().aggregate(origin, replies, None).model.buffers.tolist() == [2.0]


def test_the_vector_of_a_contiguous_state_is_a_view() -> None:
    layout = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    whole = torch.arange(12.0)
    pieces = layout.split(whole[2:])
    assert layout.vector(pieces).data_ptr() == whole[2:].data_ptr()
    assert torch.equal(layout.vector(pieces), whole[2:])
    separate = {"a": pieces["a"], "b": pieces["b"].clone()}
    transposed = {"a": whole[:6].view(3, 2).T, "b": whole[6:10]}
    for state in (separate, transposed, {"a": whole[4:10].view(2, 3), "b": whole[:4]}):
        vector = layout.vector(state)
        assert vector.data_ptr() != state["a"].data_ptr()
        assert torch.equal(vector, torch.cat([state["a"].flatten(), state["b"]]))
    assert layout.vector(layout.split(whole[2:].double())).dtype == torch.float32
    assert Layout(()).vector({}).numel() == 0
