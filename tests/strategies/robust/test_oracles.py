"""The robust rules against those of byzfl, and against plain loops, on random input."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corymb.strategies import (
    Bulyan,
    CentredClipping,
    Cohort,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Median,
    Model,
    NormClipping,
    Proxy,
    Reply,
    SightedRule,
    TrimmedMean,
)
from corymb.strategies.core.geometry import squared_distances
from corymb.strategies.robust.foolsgold import dissimilarity_weights

# byzfl's __init__ imports torchvision for its data sets; its aggregators need only torch and scipy.
spec = importlib.util.find_spec("byzfl")
assert spec is not None
sys.modules.setdefault("byzfl", importlib.util.module_from_spec(spec))
byzfl: Any = importlib.import_module("byzfl.aggregators")

seeds = st.integers(0, 10**6)


def cohort(seed: int, clients: int, size: int = 12) -> Tensor:
    return torch.randn(clients, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(rule: SightedRule[Any], models: Tensor, origin: Tensor | None = None) -> Tensor:
    replies = [Reply.of(f"site-{i:02d}", model, 1 + i) for i, model in enumerate(models)]
    start = torch.zeros(models.shape[1], dtype=models.dtype) if origin is None else origin
    return rule.aggregate(Model(start), replies, rule.initial()).model.parameters


def byzfl_result(aggregator: Any, models: Tensor) -> Tensor:
    return torch.from_numpy(aggregator(models.numpy().copy()))  # byzfl computes in float64 for numpy input


@given(seed=seeds, clients=st.integers(5, 12), hostile=st.integers(1, 2))
def test_rules_equal_those_of_byzfl(seed: int, clients: int, hostile: int) -> None:
    models = cohort(seed, clients)
    pairs: list[tuple[SightedRule[Any], Any]] = [
        (Median(), byzfl.Median()),
        # byzfl takes one neighbour more than the paper's K - f - 2
        (Krum(hostile=hostile - 1), byzfl.Krum(f=hostile)),
        (GeometricMedian(steps=400), byzfl.GeometricMedian(nu=1e-6, T=400)),
        (CentredClipping(radius=1.5, steps=4), byzfl.CenteredClipping(L=4, tau=1.5)),
    ]
    for rule, oracle in pairs:
        torch.testing.assert_close(mixed(rule, models), byzfl_result(oracle, models), rtol=1e-6, atol=1e-6)
    # byzfl averages K - f models, one more than the guarantee of Multi-Krum allows
    replies = [Reply.of(f"site-{i:02d}", model) for i, model in enumerate(models)]
    round_cohort = Cohort.of(Model(torch.zeros_like(models[0])), replies)
    selected = Krum(hostile=hostile - 1, selected=clients - hostile).mix(round_cohort, None).vector
    torch.testing.assert_close(selected, byzfl_result(byzfl.MultiKrum(f=hostile), models), rtol=1e-6, atol=1e-6)
    clipped = torch.from_numpy(byzfl.Clipping(c=2.0)(models.numpy().copy()))
    torch.testing.assert_close(mixed(NormClipping(radius=2.0), models), clipped.mean(dim=0))
    trimmed = byzfl_result(byzfl.TrMean(f=hostile), models)
    torch.testing.assert_close(mixed(TrimmedMean(trim=(hostile + 0.2) / clients), models), trimmed)


def test_distances_are_exact_where_models_lie_close_together() -> None:
    """Late in training, models are far from zero and close together: a^2 + b^2 - 2ab is noise in float32."""
    close = 10 + 1e-4 * cohort(0, 8, 1000).float()
    exact = torch.stack([(close.double() - model.double()).square().sum(dim=1) for model in close])
    torch.testing.assert_close(squared_distances(close), exact, rtol=1e-5, atol=0)
    pair = torch.cat([close, close[:1] + 1e-6, 1e20 * close[:1]])  # two next to each other, and one far away
    apart = torch.stack([(pair.double() - model.double()).square().sum(dim=1) for model in pair])
    torch.testing.assert_close(squared_distances(pair), apart, rtol=1e-12, atol=0)
    square = close.square().sum(dim=1)
    naive = square[:, None] + square - 2 * close @ close.T
    assert ((naive - exact).abs() > 0.01 * exact)[exact > 0].any()


@given(st.integers(0, 1000))
def test_equal_models_are_equally_far_from_all_others(seed: int) -> None:
    """Krum's choice must not depend on rounding, which differs between the entries of a matrix product."""
    models = torch.randn(11, 300, generator=torch.Generator().manual_seed(seed))
    models[7] = models[3]
    distances = squared_distances(models)
    others = [row for row in range(11) if row not in (3, 7)]
    assert torch.equal(distances[3, others], distances[7, others])
    assert distances[3, 7] == 0
    assert torch.equal(distances, distances.T)


@given(seed=seeds, hostile=st.integers(0, 2))
def test_bulyan_equals_a_plain_implementation(seed: int, hostile: int) -> None:
    clients = 4 * hostile + 4
    models = cohort(seed, clients, 5)
    left = list(range(clients))
    chosen: list[int] = []
    while len(chosen) < clients - 2 * hostile:
        scores = []
        for i in left:
            others = sorted(float((models[i] - models[j]).square().sum()) for j in left if j != i)
            scores.append(sum(others[: max(1, len(left) - hostile - 2)]))
        chosen.append(left.pop(scores.index(min(scores))))
    expected = []
    for column in models[chosen].T:
        values = sorted(column.tolist())
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        nearest = sorted(column.tolist(), key=lambda value: abs(value - middle))[: clients - 4 * hostile]
        expected.append(sum(nearest) / len(nearest))
    torch.testing.assert_close(mixed(Bulyan(hostile=hostile), models), torch.tensor(expected, dtype=torch.float64))


@given(seed=seeds, clients=st.integers(2, 6))
def test_foolsgold_equals_a_plain_implementation(seed: int, clients: int) -> None:
    past = cohort(seed, clients, 4)
    cosine = [[float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for b in past] for a in past]
    for i in range(clients):
        cosine[i][i] = 0.0  # as in the official code
    most = list(map(max, cosine))
    weights = []
    for i in range(clients):
        row = [cosine[i][j] * (most[i] / most[j] if most[j] > most[i] else 1) for j in range(clients)]
        weights.append(min(1.0, max(0.0, 1 - max(row))))
    top = max(weights)
    weights = [min(0.99, w / top) for w in weights]
    logits = [torch.tensor(w / (1 - w), dtype=torch.float64).log() + 0.5 for w in weights]
    pairs = torch.tensor(cosine, dtype=torch.float64)
    torch.testing.assert_close(dissimilarity_weights(pairs), torch.stack(logits).clamp(0, 1))


def test_foolsgold_gives_sybils_little_weight() -> None:
    rule, memory = FoolsGold(), FoolsGold().initial()
    for number in range(4):
        honest = cohort(number, 5)
        sybil = cohort(99, 1).expand(3, -1) + 1e-3 * cohort(number + 50, 3)
        replies = [Reply.of(f"honest-{i}", model) for i, model in enumerate(honest)]
        replies += [Reply.of(f"sybil-{i}", model) for i, model in enumerate(sybil)]
        outcome = rule.aggregate(Model(torch.zeros(12, dtype=torch.float64)), replies, memory)
        memory = outcome.memory
    assert sum(weight for node, weight in outcome.weights.items() if "sybil" in node) < 0.01


def test_fltrust_equals_a_plain_implementation() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3).double()
    proxy = Proxy(module, torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3)
    origin = torch.randn(15, dtype=torch.float64)
    rule = FLTrust(epochs=2, learning_rate=0.1)
    own = proxy.session(torch.zeros(0)).fit(
        origin, torch.arange(30), proxy.labels, epochs=2, batch_size=32, learning_rate=0.1, momentum=0.0
    ) - origin  # fmt: skip
    updates = own + cohort(3, 4, 15)
    updates[0] = -5 * own
    scores = [max(0.0, float(torch.nn.functional.cosine_similarity(u, own, dim=0))) for u in updates]
    expected = sum(s * own.norm() / u.norm() * u for s, u in zip(scores, updates, strict=True)) / sum(scores)
    replies = [Reply.of(f"site-{i}", origin + update) for i, update in enumerate(updates)]
    found = rule.aggregate(Model(origin), replies, None, proxy=proxy)
    torch.testing.assert_close(found.model.parameters, origin + expected)
    assert found.weights["site-0"] == 0


@settings(max_examples=20)
@given(seed=seeds)
def test_the_geometric_median_withstands_a_minority(seed: int) -> None:
    models = cohort(seed, 9)
    clean = mixed(GeometricMedian(), models)
    models[:4] = 1e12 * cohort(seed + 1, 4)
    assert (mixed(GeometricMedian(), models) - clean).norm() < 10
