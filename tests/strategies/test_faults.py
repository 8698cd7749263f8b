"""Faults that users found in the rules, one test each with the right value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from corymb.strategies import (
    IDA,
    MIFA,
    RULES,
    Cohort,
    FedAU,
    FedVARP,
    Layout,
    Mix,
    Model,
    Proxy,
    Reply,
    SightedRule,
    make_rule,
)  # fmt: skip
from corymb.strategies.core.client_updates import Updates
from corymb.strategies.core.proxy import Loss
from corymb.strategies.participation.fedau import Attendance
from corymb.strategies.robust.foolsgold import dissimilarity_weights
from corymb.testing import check_rule
from corymb.tests.support import NEEDED, REQUIRED_PARAMETERS


def replies(**values: list[float]) -> list[Reply]:
    return [Reply.of(node, torch.tensor(value)) for node, value in values.items()]


@pytest.mark.parametrize("rule", [MIFA(), FedVARP()], ids=["mifa", "fedvarp"])
def test_s10_a_client_that_left_no_longer_counts(rule: SightedRule[Updates]) -> None:
    """Ten clients with update 1; then only "a" is known: the model moves by 1, and the memory holds "a" only."""
    names = "abcdefghij"
    first = rule.aggregate(Model(torch.zeros(1)), replies(**{name: [1.0] for name in names}), rule.initial(), names)
    second = rule.aggregate(Model(torch.zeros(1)), replies(a=[1.0]), first.memory, {"a"})
    assert second.model.parameters.tolist() == [1.0]
    assert second.memory.nodes == ("a",)


def test_s11_fedau_by_examples_counts_the_known_clients() -> None:
    """Client "c" with 1,000 examples left; the only known client, "a" with 10, has the weight 1."""
    rule = FedAU(by_examples=True)
    memory = Attendance().with_nodes(["a", "c"])
    memory = rule.after(
        [Reply.of("a", torch.zeros(1), 10).report, Reply.of("c", torch.zeros(1), 1000).report], "ac", memory
    )
    outcome = rule.aggregate(Model(torch.zeros(1)), [Reply.of("a", torch.ones(1), 10)], memory, {"a"})
    assert outcome.weights == {"a": pytest.approx(1.0)}


def test_s13_foolsgold_has_no_similarity_below_zero() -> None:
    """The official code's diagonal of zeros keeps the largest similarity at 0 or above."""
    updates = np.array([[-1.0, 0, 0], [0.3, 1, 0], [0.3, 0, 1]])
    lengths = np.linalg.norm(updates, axis=1)
    weights = dissimilarity_weights(torch.from_numpy(updates @ updates.T / np.outer(lengths, lengths)))
    assert_allclose(weights / weights.sum(), np.full(3, 1 / 3))


@pytest.mark.parametrize("norm", [1, 2])
def test_s14_ida_of_two_models_one_ulp_apart(norm: int) -> None:
    origin = torch.full((1000,), 0.1)
    other = torch.nextafter(origin, torch.ones(()))
    rule = IDA(norm=norm)
    outcome = rule.aggregate(Model(origin), [Reply.of("a", origin.clone()), Reply.of("b", other)], None)
    assert_allclose([outcome.weights["a"], outcome.weights["b"]], 0.5, rtol=1e-12)


@dataclass(frozen=True)
class Dice(SightedRule[None]):
    """A rule whose weights come from torch's global generator."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        weights = torch.rand(len(cohort.nodes), dtype=torch.float64)
        weights = weights / weights.sum()
        return Mix(cohort.mixed(weights), weights=weights)


@dataclass(frozen=True)
class FedNova(SightedRule[None]):
    """Wang et al. 2020, FedNova: updates are divided by the number of local steps."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        steps = cohort.metrics["steps"]
        weights = cohort.shares * (cohort.shares @ steps) / steps
        return Mix(cohort.mixed(weights), weights=weights)


@dataclass(frozen=True)
class DoubledRecord(SightedRule[None]):
    """Records twice the weights that it mixes with."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        return Mix(cohort.mixed(cohort.shares), weights=2 * cohort.shares)


@dataclass(frozen=True)
class SquaresInFloat32(SightedRule[None]):
    """Weighs models by their inverse squared length, which overflows in float32."""

    shift_equivariant = False

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        squares: Tensor = cohort.models.square().sum(dim=1)
        weights = (squares / squares.sum()).double()
        return Mix(cohort.mixed(weights), weights=weights)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (Dice(), "the same round gives another model"),
        (FedNova(), "preserves_consensus = False"),
        (DoubledRecord(), "the recorded weights"),
        (SquaresInFloat32(), "9e19"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SightedRule) else "",
)
def test_s16_check_rule_finds(rule: SightedRule[None], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        check_rule(rule)


class Scaled(torch.nn.Module):
    """A classifier with a parameter without dimensions, as CLIP's `logit_scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_scale * torch.nn.functional.linear(x, self.linear.weight, self.linear.bias)


@pytest.mark.parametrize(
    "name", [name for name, kind in RULES.items() if kind.needs_proxy and name != "weight_matching"]
)
def test_e1_a_parameter_without_dimensions(name: str) -> None:
    torch.manual_seed(0)
    module = Scaled()
    origin = Layout.of_module(module).flatten(module.state_dict())
    clients = [Reply.of(f"c{i}", origin.parameters + 0.1 * torch.randn(9)) for i in range(4)]
    proxy = Proxy(module, torch.randn(40, 3), torch.arange(40) % 2)
    rule = make_rule(name)
    assert rule.aggregate(origin, clients, rule.initial(), proxy=proxy).model.parameters.isfinite().all()


class WithEmptyTensor(torch.nn.Module):
    """A classifier that also has a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.linear.weight, self.linear.bias)


def one_round(
    name: str, module: torch.nn.Module, targets: Tensor, loss: Loss = torch.nn.functional.cross_entropy
) -> Model:
    """Aggregate four replies with the rule called `name`."""
    torch.manual_seed(0)
    origin = Layout.of_module(module).flatten(module.state_dict())
    size = origin.parameters.numel()
    clients = [Reply.of(f"site-{i:02d}", origin.parameters + 0.1 * torch.randn(size), 5, NEEDED) for i in range(8)]
    rule = make_rule(name, **REQUIRED_PARAMETERS.get(name, {}))
    proxy = Proxy(module, torch.randn(40, 3), targets, loss)
    return rule.aggregate(origin, clients, rule.initial(), proxy=proxy).model


@pytest.mark.parametrize("name", RULES)
def test_e5_a_tensor_without_elements(name: str) -> None:
    assert one_round(name, WithEmptyTensor(), torch.arange(40) % 2).parameters.isfinite().all()


@pytest.mark.parametrize("name", ["run_off_distillation", "greedy_soup", "fisher"])
def test_e5_a_model_of_one_logit_has_no_class_scores(name: str) -> None:
    targets = (torch.arange(40) % 2).float()[:, None]
    with pytest.raises(ValueError, match=r"two or more classes, \[N, C\], and the module returns \[40, 1\]"):
        one_round(name, torch.nn.Linear(3, 1), targets, torch.nn.functional.binary_cross_entropy_with_logits)


@pytest.mark.parametrize("name", RULES)
def test_e5_a_model_without_parameters(name: str) -> None:
    with pytest.raises(ValueError, match="has no parameters"):
        one_round(name, torch.nn.Identity(), torch.arange(40) % 2)
