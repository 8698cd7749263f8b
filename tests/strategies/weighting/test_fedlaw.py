from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from corymb.strategies import FedLAW, Layout, Model, Outcome, Proxy, Reply
from corymb.strategies.weighting.coherence import coherence, label_coherence
from corymb.tests.support import golden

GOLDEN = golden("fedlaw")
PRECISION = [(torch.float64, 1e-9), (torch.float32, 1e-4)]


def mixture(outcome: Outcome[None]) -> list[float]:
    """Return the paper's lambda: the recorded weights divided by gamma."""
    return [weight / outcome.notes["gamma"] for weight in outcome.weights.values()]


def learned(
    rule: FedLAW,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    clients: int = 3,
    metrics: list[dict[str, float]] | None = None,
) -> Outcome[None]:
    proxy = Proxy(nn.Linear(2, 3, dtype=dtype), torch.tensor(GOLDEN["X"], dtype=dtype), torch.tensor(GOLDEN["Y"]))
    replies = [
        Reply.of(f"site-{i}", scale * torch.tensor(model, dtype=dtype), size, metrics[i] if metrics else None)
        for i, (model, size) in enumerate(zip(GOLDEN["client_models_flat"], GOLDEN["sizes"], strict=True))
    ][:clients]
    origin = torch.tensor(GOLDEN["delta_form"]["w_global"], dtype=dtype)
    return rule.aggregate(Model(origin), replies, None, proxy=proxy)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adam_lr0.01_e20", {}),
        ("adam_lr0.01_e50_steplr", {"epochs": 50}),
        ("adam_lr0.005_e100", {"epochs": 100, "learning_rate": 0.005}),
        ("sgd_lr0.01_e20", {"optimizer": "sgd"}),
        ("only_gamma_e20", {"learn": "gamma"}),
        ("only_lambda_e20", {"learn": "lambda"}),
    ],
)
def test_worked_values(name: str, settings: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    expected = GOLDEN[name]
    outcome = learned(FedLAW(**{"learning_rate": 0.01, **settings}), dtype)
    assert_allclose(mixture(outcome), expected["lam"], rtol=tolerance)
    assert_allclose(outcome.notes["gamma"], expected["gamma"], rtol=tolerance)
    assert_allclose(outcome.model.parameters, expected["model"], rtol=tolerance, atol=tolerance)
    assert_allclose(outcome.notes["proxy-loss"], expected["proxy_loss"], rtol=tolerance)


@pytest.mark.parametrize("step", GOLDEN["adam_lr0.01_e20_trace_first3"])
def test_the_first_steps(step: dict[str, Any]) -> None:
    if step["epoch"]:
        outcome = learned(FedLAW(learning_rate=0.01, epochs=step["epoch"]))
        assert_allclose(mixture(outcome), step["lam"], rtol=1e-9)
        assert_allclose(outcome.notes["gamma"], step["gamma"], rtol=1e-9)
        assert_allclose(outcome.notes["proxy-loss"], step["loss"], rtol=1e-9)


@pytest.mark.parametrize("step", GOLDEN["adam_lr0.01_e20_trace_first3"])
def test_the_gradients_of_the_first_steps(step: dict[str, Any]) -> None:
    """The rule also takes gradients by autograd through the mixture."""
    proxy = Proxy(nn.Linear(2, 3, dtype=torch.float64), torch.tensor(GOLDEN["X"]).double(), torch.tensor(GOLDEN["Y"]))
    models = torch.tensor(GOLDEN["client_models_flat"], dtype=torch.float64)
    mixture = torch.tensor(step["lam"], dtype=torch.float64).log().requires_grad_()
    shrink = torch.tensor([step["gamma"]], dtype=torch.float64).log().requires_grad_()
    loss = proxy.session(torch.zeros(0)).loss(shrink.exp() * mixture.softmax(dim=0) @ models, torch.arange(6))
    found = torch.cat(torch.autograd.grad(loss, (mixture, shrink)))
    assert_allclose(loss.detach(), step["loss"], rtol=1e-9)
    assert_allclose(found, step["grad"], rtol=1e-7, atol=1e-9)


def test_a_single_model_is_shrunk() -> None:
    outcome = learned(FedLAW(learning_rate=0.01), clients=1)
    assert_allclose(outcome.notes["gamma"], GOLDEN["single_client_e20"]["gamma"], rtol=1e-9)
    assert_allclose(outcome.model.parameters, GOLDEN["single_client_e20"]["model"], atol=1e-9)


@pytest.mark.parametrize(("name", "scale"), [("models_x3", 3.0), ("models_x0.2", 0.2)])
def test_overfit_models_shrink_and_small_ones_grow(name: str, scale: float) -> None:
    outcome = learned(FedLAW(learning_rate=0.01, epochs=100), scale=scale)
    expected = GOLDEN["shrink"][name]
    assert_allclose(outcome.notes["gamma"], expected["gamma"], rtol=1e-9)
    assert_allclose(mixture(outcome), expected["lam"], rtol=1e-9)
    assert (outcome.notes["gamma"] < 0.8) if scale > 1 else (outcome.notes["gamma"] > 1.3)


@pytest.mark.parametrize("settings", [{"form": "quad"}, {"average": True}, {"average": True, "form": "quad"}])
def test_every_variant_lowers_the_loss(settings: dict[str, Any]) -> None:
    outcome = learned(FedLAW(learning_rate=0.02, epochs=40, **settings))
    assert outcome.notes["proxy-loss"] < GOLDEN["fedavg"]["proxy_loss"] - 0.1
    assert sum(mixture(outcome)) == pytest.approx(1)


def test_coherence() -> None:
    expected = GOLDEN["coherence"]
    models = torch.tensor(expected["updates"], dtype=torch.float64)
    found = coherence(models, torch.zeros(9, dtype=torch.float64))
    assert_allclose(found.pairs, expected["pairwise_cosine"], rtol=1e-9)
    assert_allclose(found.mean, expected["mean_offdiag"], rtol=1e-9)
    assert_allclose(found.client_mean, expected["per_client_mean_offdiag"], rtol=1e-9)
    assert_allclose(found.with_mean, expected["cos_to_mean_update"], rtol=1e-9)
    with_zero_update = coherence(torch.cat([models, torch.zeros(1, 9)]), torch.zeros(9, dtype=torch.float64))
    assert with_zero_update.mean == pytest.approx(expected["mean_offdiag"])
    shares = torch.tensor(expected["label_dists"], dtype=torch.float64)
    total = torch.tensor(expected["global_label_dist"], dtype=torch.float64)
    assert_allclose(label_coherence(shares, total), expected["label_cos_to_global"], rtol=1e-9)


def test_the_coherence_of_reported_labels_is_a_note() -> None:
    shares = [[8, 2, 0], [1, 6, 3], [0, 0, 10]]
    metrics = [{f"examples-of-class-{c}": float(n) for c, n in enumerate(row) if n} for row in shares]
    found = learned(FedLAW(epochs=1), metrics=metrics).notes["label-coherence"]
    rows = torch.tensor(shares, dtype=torch.float64)
    assert found == pytest.approx(float(label_coherence(rows).mean()))
    assert "label-coherence" not in learned(FedLAW(epochs=1)).notes


def test_batch_norm_follows_the_shrunk_model() -> None:
    """The statistics must be those of the proxy data; an average over the clients would belong to another scale."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    layout = Layout.of_module(module)
    proxy = Proxy(module, torch.randn(50, 4), torch.randint(0, 3, (50,)))
    origin = layout.flatten(module.state_dict())
    replies = [Reply.of(f"site-{i}", 3 * torch.randn(layout.num_parameters), 5 + i, {}) for i in range(3)]
    replies = [replace(r, buffers=torch.rand(origin.buffers.numel())) for r in replies]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = FedLAW(epochs=3).aggregate(origin, replies, None, proxy=proxy).model
    state = layout.restore(model)
    hidden = proxy.inputs @ state["0.weight"].T + state["0.bias"]
    assert_allclose(state["1.running_mean"], hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert_allclose(state["1.running_var"], hidden.var(dim=0), rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_proxy_data_are_required() -> None:
    with pytest.raises(ValueError, match="FedLAW needs proxy data, but the server has none"):
        FedLAW().aggregate(Model(torch.zeros(2)), [Reply.of("a", torch.ones(2))], None)
