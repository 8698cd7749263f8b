from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from corymb.strategies import IDA, Model, Reply
from corymb.tests.support import golden, vector

GOLDEN = golden("ida")


def weights(rule: IDA, params: list[list[float]], dtype: torch.dtype = torch.float64) -> list[float]:
    replies = [
        Reply.of(f"site-{i}", torch.tensor(model, dtype=dtype), size, {"accuracy": accuracy})
        for i, (model, size, accuracy) in enumerate(
            zip(params, [*GOLDEN["sizes"], 1], [*GOLDEN["train_acc"], 1.0], strict=False)
        )
    ]
    origin = torch.zeros(len(params[0]), dtype=dtype)
    return list(rule.aggregate(Model(origin), replies, None).weights.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "ida"),
        ({"factors": "examples"}, "fedavg"),
        ({"factors": "distance+examples"}, "ida_fedavg"),
        ({"factors": "accuracy"}, "intrac"),
        ({"factors": "distance+accuracy"}, "ida_intrac"),
        ({"factors": "distance+examples+accuracy"}, "ida_fedavg_intrac"),
        ({"norm": 2}, "l2_variant"),
        ({"centre": "weighted"}, "size_weighted_centre_variant"),
    ],
)
def test_worked_weights(settings: dict[str, Any], name: str, dtype: torch.dtype, tolerance: float) -> None:
    assert_allclose(weights(IDA(**settings), GOLDEN["params"], dtype), GOLDEN[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("factors", "name"),
    [
        ("distance", "ida_model"),
        ("examples", "fedavg_model"),
        ("distance+examples", "ida_fedavg_model"),
        ("distance+accuracy", "ida_intrac_model"),
    ],
)
def test_worked_models(factors: str, name: str) -> None:
    replies = [
        Reply.of(f"site-{i}", vector(*model), size, {"accuracy": accuracy})
        for i, (model, size, accuracy) in enumerate(
            zip(GOLDEN["params"], GOLDEN["sizes"], GOLDEN["train_acc"], strict=True)
        )
    ]
    outcome = IDA(factors).aggregate(Model(vector(7.0, -2.0, 1.0)), replies, None)
    assert_allclose(outcome.model.parameters, GOLDEN[name], rtol=0, atol=1e-9)


def test_edge_cases() -> None:
    edge = GOLDEN["edge"]
    assert weights(IDA(), [[3.0]]) == edge["K1"]
    assert_allclose(weights(IDA(), [[3.0, 1.0], [9.0, -4.0]]), edge["K2_always_half"], rtol=1e-12)
    assert_allclose(weights(IDA(), [[1.0]] * 3), edge["all_identical_uniform"], rtol=1e-12)
    on_mean = edge["one_exactly_on_mean"]
    assert_allclose(weights(IDA(), on_mean["params"]), on_mean["weights"], rtol=1e-9)
    assert_allclose(weights(IDA(epsilon=0.01), on_mean["params"]), on_mean["weights_eps_rel_1e-2"], rtol=1e-9)
    far = edge["breakdown_two_colluding_far"]
    assert_allclose(weights(IDA(), far["params"]), far["weights"], rtol=1e-9)


def test_the_accuracy_factor_needs_a_reported_accuracy() -> None:
    silent, reporting = Reply.of("a", vector(1.0)), Reply.of("b", vector(3.0), 1, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="needs the metric 'accuracy'"):
        IDA("accuracy").aggregate(Model(vector(0.0)), [silent], None)
    assert IDA("accuracy").aggregate(Model(vector(0.0)), [silent, reporting], None).weights == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    "wrong", [{"factors": "distanse"}, {"centre": "mode"}, {"norm": 3}, {"floor": 0.0}, {"epsilon": -1.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IDA(**wrong)
