from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from corymb.strategies import (
    Bulyan,
    FedAvg,
    FedDyn,
    FisherMerging,
    GreedySoup,
    IsoC,
    IsoCTS,
    Layerwise,
    Layout,
    LearnedSoup,
    Median,
    ModelStock,
    Outcome,
    Proxy,
    Reply,
    Rule,
    Scaffold,
    WeightMatching,
)
from corymb.strategies.merging.fisher import diagonal_fisher, fisher_mean
from corymb.strategies.merging.isotropic import ranks
from corymb.strategies.merging.model_stock import stock_share
from corymb.strategies.merging.permutation import layer_axes, match, permuted
from corymb.tests.support import golden

GOLDEN = golden("merging")
PRECISION = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])


def mixed(
    rule: Rule[Any], origin: Any, models: dict[str, Any], dtype: torch.dtype, proxy: Proxy | None = None
) -> Outcome[Any]:
    """Return the outcome of one round with models of a single tensor "w"."""
    state = {"w": torch.tensor(origin, dtype=dtype)}
    replies = [Reply.of(name, torch.tensor(m, dtype=dtype).reshape(-1)) for name, m in models.items()]
    return rule.aggregate(Layout.of(state).flatten(state), replies, rule.initial(), proxy=proxy)


def merged(
    rule: Rule[Any], origin: Any, models: dict[str, Any], dtype: torch.dtype, proxy: Proxy | None = None
) -> Tensor:
    """Return the parameters after one such round."""
    return mixed(rule, origin, models, dtype, proxy).model.parameters


class Point(nn.Module):
    """A model whose parameters are a point, and whose outputs are this point for any input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.w + 0 * inputs


def point_proxy(dtype: torch.dtype) -> Proxy:
    """Return proxy data whose loss is the squared distance to (0.9, 0.2)."""
    target = torch.tensor([[0.9, 0.2]], dtype=dtype)
    return Proxy(Point(dtype), torch.zeros(1, 2, dtype=dtype), target, lambda out, true: (out - true).square().sum())


@PRECISION
def test_worked_soups(dtype: torch.dtype, tolerance: float) -> None:
    soups = GOLDEN["soups"]
    uniform = merged(FedAvg(by_examples=False), [0.0, 0.0], soups["models"], dtype)
    assert_allclose(uniform, soups["uniform"], atol=tolerance)
    outcome = mixed(GreedySoup(score="loss", mean=False), [0.0, 0.0], soups["models"], dtype, point_proxy(dtype))
    assert {name for name, weight in outcome.weights.items() if weight} == set(soups["greedy_ingredients"])
    greedy = outcome.model.parameters
    assert_allclose(greedy, soups["greedy"], atol=tolerance)
    assert -point_proxy(dtype).loss_of(greedy, torch.zeros(0)) == pytest.approx(soups["greedy_score"], abs=tolerance)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_learned_soup_is_at_least_as_good_as_the_best_model(by_layer: bool) -> None:
    rule = LearnedSoup(by_layer=by_layer, epochs=200)
    proxy = point_proxy(torch.float64)
    found = merged(rule, [0.0, 0.0], GOLDEN["soups"]["models"], torch.float64, proxy)
    assert proxy.loss_of(found, torch.zeros(0)) < -max(GOLDEN["soups"]["individual"].values())


@PRECISION
def test_worked_model_stock(dtype: torch.dtype, tolerance: float) -> None:
    stock = GOLDEN["model_stock"]
    models = dict(zip("abc", stock["models"], strict=True))
    two = {name: models[name] for name in "ab"}
    assert_allclose(merged(ModelStock(), stock["w0"], two, dtype), stock["two"]["merged"], atol=tolerance)
    assert_allclose(merged(ModelStock(), stock["w0"], models, dtype), stock["three"]["merged"], atol=tolerance)

    def pair(cosine: float) -> Tensor:
        return torch.tensor([[1.0, cosine], [cosine, 1.0]])

    assert stock_share(pair(stock["negative_cos"]["cos"])) == stock["negative_cos"]["t_clamped"]
    assert stock_share(pair(1.0)) == stock["identical"]["t"]
    assert stock_share(pair(0.0)) == stock["orthogonal"]["t"]
    assert stock_share(pair(torch.nan)) == 0


def test_worked_fisher_means() -> None:
    worked = GOLDEN["fisher"]
    models, fishers = (torch.tensor(worked[key], dtype=torch.float64) for key in ("params", "fishers"))
    half = torch.tensor([0.5, 0.5])
    plain = {"weights": half, "normalise": False}
    assert_allclose(fisher_mean(models, fishers, floor_first_only=True, **plain), worked["equal"], rtol=1e-9)  # type: ignore[arg-type]
    assert_allclose(fisher_mean(models, fishers, **plain), worked["equal_floor_all"], rtol=1e-9)  # type: ignore[arg-type]
    found = fisher_mean(models, fishers, torch.tensor([0.3, 0.7], dtype=torch.float64), floor_first_only=True)
    assert_allclose(found, worked["lam_0.3_0.7_normalised"], rtol=1e-9)
    assert_allclose(fisher_mean(models, torch.ones(2, 4), half), worked["constant_fisher_is_mean"], rtol=1e-9)


@PRECISION
def test_the_fisher_of_softmax_regression(dtype: torch.dtype, tolerance: float) -> None:
    worked = GOLDEN["fisher"]["diag_fisher_linear_softmax"]
    module = nn.Linear(2, 3, bias=False, dtype=dtype)
    proxy = Proxy(module, torch.tensor([worked["x"]], dtype=dtype))
    found = diagonal_fisher(proxy, torch.tensor(worked["W"], dtype=dtype).reshape(-1), torch.zeros(0))
    assert_allclose(found.reshape(3, 2), worked["closed_form_p(1-p)x^2"], rtol=tolerance)


def test_the_batched_fisher_equals_the_one_computed_by_hand() -> None:
    """Each of the two models depends on only one of the two inputs."""
    module = nn.Linear(2, 2, bias=False)
    models = {"a": [[4.0, 0.0], [-4.0, 0.0]], "b": [[0.0, 4.0], [0.0, -4.0]]}
    state = module.state_dict()
    replies = [Reply.of(name, torch.tensor(weights).reshape(-1)) for name, weights in models.items()]
    proxy = Proxy(module, torch.tensor([[0.1, 0.1], [1.0, -1.0]]))
    rule = FisherMerging()
    found = rule.aggregate(Layout.of_module(module).flatten(state), replies, None, proxy=proxy).model
    assert found.parameters.isfinite().all()
    batched = diagonal_fisher(proxy, replies[0].parts[0], torch.zeros(0))
    by_hand = torch.zeros(4, dtype=torch.float64)
    for x in proxy.inputs:
        w = replies[0].parts[0].reshape(2, 2).clone().requires_grad_()
        logs = (w @ x).log_softmax(dim=0)
        for c in range(2):
            (gradient,) = torch.autograd.grad(logs[c], w, retain_graph=True)
            by_hand += logs[c].exp().detach() * gradient.reshape(-1).square() / 2
    assert_allclose(batched, by_hand, rtol=1e-5)


MATCHING = GOLDEN["weight_matching"]


def network(worked: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Layout, Tensor]:
    names = ("W1", "b1", "W2", "b2")
    state = {name: torch.tensor(worked[name], dtype=dtype) for name in names}
    return Layout.of(state), torch.cat([state[name].reshape(-1) for name in names])


class OneHiddenLayer(nn.Module):
    """The network of the worked example."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        hidden = nn.functional.linear(x, weights["W1"], weights["b1"]).relu()
        return nn.functional.linear(hidden, weights["W2"], weights["b2"])


def test_worked_weight_matching() -> None:
    layout, reference = network(MATCHING["A"])
    _, other = network(MATCHING["B"])
    (order,) = match(layout, reference, other)
    assert order.tolist() == MATCHING["perm"]
    ordered = permuted(layout, other, [order])
    assert_allclose(ordered, network(MATCHING["B_permuted"])[1], atol=1e-12)
    assert_allclose((other - reference).norm(), MATCHING["l2_before"], rtol=1e-9)
    assert_allclose((ordered - reference).norm(), MATCHING["l2_after"], rtol=1e-9)
    replies = [Reply.of("a", reference), Reply.of("b", other)]
    state = layout.restore(layout.flatten(layout.split(reference)))
    proxy = Proxy(OneHiddenLayer(state), torch.randn(8, layout.entries[0].shape[1], dtype=torch.float64))
    middle = WeightMatching().aggregate(layout.flatten(state), replies, None, proxy=proxy).model.parameters
    assert_allclose(middle, (reference + ordered) / 2, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_matching_undoes_a_permutation_that_keeps_the_outputs(seed: int) -> None:
    """The network is a chain of convolutions, norms, flattening and linear layers."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.GroupNorm(5, 5), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 36, 16), nn.ReLU(), nn.Linear(16, 4),
    ).double()  # fmt: skip
    layout = Layout.of_module(module)
    vector = layout.flatten(module.state_dict()).parameters
    axes = layer_axes(layout)
    orders = [torch.randperm(size) for size in (6, 5, 16)]
    shuffled = permuted(layout, vector, orders, axes)
    inputs = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    proxy = Proxy(module, inputs)
    assert_allclose(proxy.scores(shuffled, torch.zeros(0)), proxy.scores(vector, torch.zeros(0)), atol=1e-10)
    back = permuted(layout, shuffled, match(layout, vector, shuffled, axes, seed), axes)
    assert torch.equal(back, vector)


class Residual(nn.Module):
    """Layers of equal width with a connection around the second one, or layers that are called in another order."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.swapped = swapped
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.two(x).relu() if self.swapped else self.one(x).relu()
        second: Tensor = self.one(hidden).relu() if self.swapped else hidden + self.two(hidden).relu()
        out: Tensor = self.three(second)
        return out


@pytest.mark.parametrize(
    "make",
    [
        lambda: Residual(swapped=False),
        lambda: Residual(swapped=True),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 8)),
    ],
    ids=["residual", "out of order", "groups of units"],
)
def test_s12_weight_matching_refuses_to_change_what_a_model_computes(make: Callable[[], nn.Module]) -> None:
    replies = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = make()
        replies.append(Reply.of(f"c{seed}", Layout.of_module(module).flatten(module.state_dict()).parameters))
    origin = Layout.of_module(module).flatten(module.state_dict())
    with pytest.raises(ValueError, match="changes the outputs of the model; weight matching needs a plain chain"):
        WeightMatching().aggregate(origin, replies, None, proxy=Proxy(module, torch.randn(20, 8)))


def test_a_client_with_extreme_weights_is_left_out_and_ends_no_run() -> None:
    """Sums of 1e8 and -1e8 lose the third unit in one order and not in another."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    layout = Layout.of_module(module)
    origin = layout.flatten(module.state_dict())
    hostile = {name: torch.ones_like(tensor) for name, tensor in module.state_dict().items()}
    hostile["0.bias"] = torch.tensor([2.0, 1.0, 2.0])
    hostile["2.weight"] = torch.tensor([[1e8, 1.0, -1e8]])
    vectors = [origin.parameters, origin.parameters + 0.1, layout.flatten(hostile).parameters]
    replies = [Reply.of(f"c{number}", vector) for number, vector in enumerate(vectors)]
    proxy = Proxy(module, 100 * torch.rand(20, 2))
    for rule in (WeightMatching(), WeightMatching(merge_rule=Median())):
        outcome = rule.aggregate(origin, list(replies), None, proxy=proxy)
        assert outcome.notes["dropped"] == 1
        assert_allclose(outcome.model.parameters, origin.parameters + 0.05, atol=1e-5)
    assert WeightMatching().aggregate(origin, list(replies), None, proxy=proxy).weights["c2"] == 0


def test_a_rule_inside_another_needs_nothing_but_models() -> None:
    for rule in (Scaffold(), FedDyn()):
        with pytest.raises(ValueError, match="or needs proxy data, metrics or a client algorithm"):
            Layerwise(rule)
        with pytest.raises(ValueError, match="or needs proxy data, metrics or a client algorithm"):
            WeightMatching(merge_rule=rule)
    assert WeightMatching(merge_rule=Bulyan(hostile=1)).min_replies() == 7


def test_layers_that_are_no_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="'c' has 5 inputs after a layer of 3 units; weight matching needs a plain"):
        layer_axes(Layout.of({"a": torch.zeros(3, 2), "c": torch.zeros(4, 5)}))
    with pytest.raises(ValueError, match=r"'b' of shape \[4\] does not fit a layer of 3 units"):
        layer_axes(Layout.of({"a": torch.zeros(3, 2), "b": torch.zeros(4)}))


@PRECISION
@pytest.mark.parametrize(
    ("rule", "tasks", "name"),
    [
        (IsoC(), "D", "iso_c"),
        (IsoC(), "cts_inputs", "iso_c_5x5"),
        (IsoCTS(common=GOLDEN["iso"]["cts_common_fraction"]), "cts_inputs", "iso_cts"),
    ],
)
def test_worked_isotropic_merging(rule: Rule[Any], tasks: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    worked = GOLDEN["iso"]
    size = len(worked[name])
    models = {f"task-{i}": task for i, task in enumerate(worked[tasks])}
    found = merged(rule, [[0.0] * size] * size, models, dtype)
    assert_allclose(found.reshape(size, size), worked[name], atol=tolerance * 10)


def test_tensors_other_than_matrices_take_the_mean_update() -> None:
    models = {"a": [1.0, 2.0], "b": [3.0, 0.0]}
    for rule in (IsoC(scale=2.0), IsoCTS()):
        assert merged(rule, [0.0, 0.0], models, torch.float64).tolist() == [2.0, 1.0]


def test_worked_ranks() -> None:
    for case in GOLDEN["iso"]["common_rank_examples"]:
        kept, own = ranks(case["r"], case["T"], case["frac"])
        assert kept == case["k"]
        assert kept + own * case["T"] == case["r"]
    assert ranks(5, 2, GOLDEN["iso"]["cts_common_fraction"]) == (
        GOLDEN["iso"]["cts_common_rank"],
        GOLDEN["iso"]["cts_dims_per_task"],
    )


def test_worked_outputs_of_matched_networks() -> None:
    """At the input (0.7, -0.3), with rectified hidden units."""
    inputs = torch.tensor([0.7, -0.3], dtype=torch.float64)

    def outputs(layout: Layout, vector: Tensor) -> Tensor:
        net = layout.split(vector)
        return net["W2"] @ (net["W1"] @ inputs + net["b1"]).relu() + net["b2"]

    (layout, a), (_, b) = network(MATCHING["A"]), network(MATCHING["B"])
    ordered = permuted(layout, b, match(layout, a, b))
    assert_allclose(outputs(layout, a), MATCHING["A_output"], atol=1e-9)
    assert_allclose(outputs(layout, b), MATCHING["function_unchanged_on_x"], atol=1e-9)
    assert_allclose(outputs(layout, ordered), MATCHING["function_unchanged_on_x"], atol=1e-9)
    assert_allclose(outputs(layout, (a + b) / 2), MATCHING["midpoint_output_before"], atol=1e-9)
    assert_allclose(outputs(layout, (a + ordered) / 2), MATCHING["midpoint_output_after"], atol=1e-9)
