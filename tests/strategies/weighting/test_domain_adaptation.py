from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from corymb.strategies import FedDA, FedGP, Layout, Model, Outcome, Reply
from corymb.strategies.weighting.domain_adaptation import RoundUpdates, TargetRule, automatic_weights, projections
from corymb.tests.support import golden

GOLDEN = golden("fedgp")
OFFICIAL = GOLDEN["official_code_variant"]
PRECISION = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])


def outcome(
    rule: TargetRule,
    dtype: torch.dtype = torch.float64,
    target: list[float] | None = GOLDEN["target_update"],
    metrics: dict[str, list[float]] | None = None,
    examples: tuple[int, ...] = (1, 1, 1),
    layers: tuple[int, ...] = (4,),
    steps: Tensor | None = None,
) -> Outcome[int]:
    """Return the outcome of one round that starts from a model of ones."""
    state = {f"layer{i}": torch.ones(size, dtype=dtype) for i, size in enumerate(layers)}
    sources = {f"source-{i}": update for i, update in enumerate(GOLDEN["source_updates"])}
    clients = sources | ({"target": target} if target else {})
    replies = [
        Reply.of(name, 1 + torch.tensor(update, dtype=dtype), size, {k: v[i] for k, v in (metrics or {}).items()})
        for i, ((name, update), size) in enumerate(zip(clients.items(), (*examples, 5), strict=False))
    ]
    replies = [replace(r, steps=steps if r.report.node == "target" else None) for r in replies]
    return rule.aggregate(Layout.of(state).flatten(state), replies, 0)


def update(rule: TargetRule, dtype: torch.dtype = torch.float64, **settings: Any) -> Tensor:
    return outcome(rule, dtype, **settings).model.parameters - 1


@PRECISION
@pytest.mark.parametrize(
    ("rule", "name", "layers"),
    [
        (FedDA("target"), "fedda_beta0.5", (4,)),
        (FedGP("target"), "fedgp_beta0.5", (4,)),
        (FedGP("target", beta=0.0), "fedgp_beta0_is_target_only", (4,)),
        (FedDA("target", beta=1.0), "fedda_beta1_is_source_mean", (4,)),
        (FedGP("target", by_layer=True), "fedgp_beta0.5_layerwise_split_0:2_2:4", (2, 2)),
    ],
)
def test_worked_updates(
    rule: TargetRule, name: str, layers: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    assert_allclose(update(rule, dtype, layers=layers), GOLDEN[name], rtol=0, atol=tolerance)


@PRECISION
@pytest.mark.parametrize(
    ("rule", "name"), [(FedDA("target", auto=True), "fedda_auto"), (FedGP("target", auto=True), "fedgp_auto")]
)
def test_worked_automatic_weights(rule: TargetRule, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The target's update is the sum of its three batches; each source trained on one batch."""
    batches = torch.tensor(GOLDEN["target_batch_updates"], dtype=dtype)
    metrics = {"steps": [1.0, 1.0, 1.0, 3.0]}
    found = update(rule, dtype, target=batches.sum(dim=0).tolist(), metrics=metrics, steps=batches)
    assert_allclose(found / 3, GOLDEN[name], rtol=0, atol=tolerance)


def test_worked_estimates() -> None:
    batches = torch.tensor(GOLDEN["target_batch_updates"], dtype=torch.float64)
    sources = torch.tensor(GOLDEN["source_updates"], dtype=torch.float64)
    found = automatic_weights(RoundUpdates(batches.sum(dim=0), 3 * sources, batches))
    for kind, name in zip(found, ("beta_fedda", "beta_fedgp", "beta_fedgp_thresh"), strict=True):
        assert_allclose(kind, [source[name] for source in GOLDEN["auto"]], atol=1e-12)
    assert_allclose(projections(batches.mean(dim=0), sources), GOLDEN["proj_plus"], atol=1e-12)


def test_the_variant_of_the_official_code() -> None:
    metrics = {"steps": [6.0, 6.0, 6.0, 3.0]}
    rule = FedGP("target", cosine=True, rate_ratio=OFFICIAL["lr_target"] / OFFICIAL["lr_source"])
    found = update(rule, metrics=metrics, examples=tuple(OFFICIAL["n_source"]))
    assert_allclose(found, OFFICIAL["update"], atol=1e-9)


def test_edge_cases() -> None:
    edge = GOLDEN["edge"]
    target = torch.tensor(GOLDEN["target_update"], dtype=torch.float64)
    assert_allclose(0.5 * target + 0.5 * projections(target, -target[None])[0], edge["opposite_source"], atol=1e-12)
    assert projections(target, 0 * target[None])[0].tolist() == edge["zero_source"]
    same = target.expand(3, 4)
    first = torch.tensor(GOLDEN["source_updates"][:1])
    for sources, name in ((first, "identical_batches_sigma0"), (target[None], "identical_everything")):
        found = automatic_weights(RoundUpdates(3 * target, 3 * sources.double(), same))
        names = ("beta_fedda", "beta_fedgp", "beta_fedgp_thresh")
        assert [float(kind) for kind in found] == pytest.approx([edge[name][key] for key in names], abs=1e-9)
    single_batch = automatic_weights(RoundUpdates(target, target[None], target[None]))
    assert single_batch.update.tolist() == [0.5]  # the variance is unknown


@pytest.mark.parametrize("rule", [FedDA("target"), FedGP("target", auto=True)])
def test_a_round_without_the_target_changes_nothing(rule: TargetRule) -> None:
    assert update(rule, target=None).tolist() == [0] * 4


def test_a_round_without_sources_takes_the_targets_update() -> None:
    reply = Reply.of("target", torch.ones(3))
    assert FedGP("target").aggregate(Model(torch.zeros(3)), [reply], 0).model.parameters.tolist() == [1] * 3


def test_the_first_rounds_may_average_the_sources() -> None:
    rule = FedGP("target", warmup_rounds=1)
    assert_allclose(
        update(rule, examples=(1, 2, 1)),
        torch.tensor([1, 2, 1]) / 4 @ torch.tensor(GOLDEN["source_updates"]),
        atol=1e-6,
    )
    assert outcome(rule).memory == 1
