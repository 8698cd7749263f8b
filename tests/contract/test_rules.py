"""Every built-in rule passes `check_rule`, and `check_rule` finds rules that break a promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corymb.simulations.scaffold.fixtures import first_model, one_round, replies_to
from corymb.strategies import (
    IDA,
    RULES,
    BlindRule,
    Cohort,
    FedAvg,
    Krum,
    Median,
    Mix,
    Model,
    Plurality,
    Reply,
    Report,
    Rule,
    RunOff,
    SightedRule,
    known_rules,
    make_rule,
)
from corymb.strategies.core.client_updates import Updates
from corymb.testing import check_rule
from corymb.tests.support import REQUIRED_PARAMETERS, vector

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, REQUIRED_PARAMETERS.get(name, {})) for name in RULES),
    ("fedau", {"cutoff": None, "by_examples": True}),
    ("fedda", {"target": "site-00", "auto": True}),
    ("fedgp", {"target": "site-00", "by_layer": True}),
    ("fedlaw", {"form": "quad", "epochs": 3}),
    ("fedlaw", {"average": True, "epochs": 14}),
    ("ida", {"factors": "distance+examples+accuracy"}),
    ("krum", {"hostile": 2, "selected": 4}),
    ("bulyan", {"hostile": 2}),
    ("bulyan", {"one_pass": True}),
    ("geometric_median", {"by_examples": True}),
    ("norm_clipping", {"radius": 0.5}),
    ("layerwise", {"rule": {"name": "krum", "hostile": 2}}),
    ("learned_soup", {"by_layer": True}),
    ("plurality", {"versions": 2}),
    ("plurality", {"groups": 4}),
    ("run_off", {"groups": 5, "spread": 2}),
    ("run_off", {"abstain": True}),
    ("run_off_distillation", {"election": "plurality", "epochs": 2}),
    ("weight_matching", {"reference": "origin", "merge_rule": "model_stock"}),
]


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=lambda value: str(value))
def test_every_rule_passes_the_check(name: str, parameters: dict[str, Any]) -> None:
    check_rule(make_rule(name, **parameters))


@dataclass(frozen=True)
class TakesTheFirst(SightedRule[None]):
    """Returns the model of the first client by name, and claims to be robust."""

    buffers = "median"
    robust: ClassVar[int] = 2

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        return Mix(cohort.models[0])

    def tolerates(self, clients: int) -> int:
        """Return a number that the rule does not tolerate."""
        return self.robust


@dataclass(frozen=True)
class TakesTheLast(TakesTheFirst):
    """Returns the model of the last client by name."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        return Mix(cohort.models[-1])


@dataclass(frozen=True)
class CutsAtThreeHundred(TakesTheFirst):
    """Withstands only replies that are far from the origin."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        near = (cohort.models - cohort.origin).norm(dim=1) < 300
        return Mix(cohort.models[near].mean(dim=0))


@dataclass(frozen=True)
class AveragesBuffers(Median):
    """A median of the parameters, with the mean of the buffers."""

    buffers = "mean"  # type: ignore[assignment]


@dataclass(frozen=True)
class SpoilsTheProxy(SightedRule[None]):
    """Modifies the server's proxy data in place."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        cohort.proxy.inputs.add_(1)
        return Mix(cohort.mixed(cohort.shares))


@dataclass(frozen=True)
class Writes(SightedRule[None]):
    """Modifies the origin in place."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        return Mix(cohort.origin.add_((cohort.models - cohort.origin).mean(dim=0)))


@dataclass(frozen=True)
class Doubles(BlindRule[None]):
    """Moves twice as far as the mean of the replies."""

    def weight(self, report: Report, memory: None) -> float:
        """See `BlindRule.weight`."""
        return 1.0

    def scale(self, total: float, reports: Any, known: Any, memory: None) -> float:
        """See `BlindRule.scale`."""
        return 2 / total if total else 0.0


@dataclass(frozen=True)
class Shrinks(SightedRule[None]):
    """Moves the mean towards zero, unless all replies agree."""

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        mean = cohort.models.mean(dim=0)
        return Mix(mean * (1 - 0.1 * (cohort.models - mean).abs().max().clamp(max=1)))


@dataclass(frozen=True)
class Divides(BlindRule[None]):
    """Divides by the number of examples, which may be 0."""

    def weight(self, report: Report, memory: None) -> float:
        """See `BlindRule.weight`."""
        return float(report.examples)

    def scale(self, total: float, reports: Any, known: Any, memory: None) -> float:
        """See `BlindRule.scale`."""
        return 1 / total if total else float("nan")


@dataclass(frozen=True)
class Forgets(SightedRule[Updates]):
    """Keeps state outside of its memory."""

    past: ClassVar[list[int]] = []

    def mix(self, cohort: Cohort, memory: Updates) -> Mix[Updates]:
        """See `SightedRule.mix`."""
        self.past.append(1)
        return Mix(cohort.models.mean(dim=0) + len(self.past) * 1e-3 * (len(cohort.nodes) > 1), memory)

    def initial(self) -> Updates:
        """Return an empty memory."""
        return Updates()


class NoRecord(FedAvg):
    """A rule without a docstring, which is also not a dataclass itself."""

    __doc__ = None


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (TakesTheFirst(), r"2 hostile replies of 11 \(all shifted by 3, from reply 0 on\) move the model by"),
        (TakesTheLast(), r"2 hostile replies of 11 \(all shifted by 3, from reply 9 on\) move the model by"),
        (CutsAtThreeHundred(), r"2 hostile replies of 11 \(all shifted by 30, from reply 0 on\) move the model by"),
        (AveragesBuffers(), r"5 hostile replies of 11 \(all shifted by 3, from reply 0 on\) move the buffers beyond"),
        (SpoilsTheProxy(), "it modifies the proxy data or the proxy module"),
        (Writes(), "the model depends on the order of the replies|modifies the models that are passed to it"),
        (Doubles(), "the next model differs from the only reply"),
        (Shrinks(), "it is not shift-equivariant; declare"),
        (Divides(), "0 examples give a model that is not finite"),
        (Forgets(), "another model .* when it is repeated; keep no state outside of the memory"),
        (NoRecord(), "NoRecord has no docstring"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Rule) else "",
)
def test_the_check_finds_a_broken_promise(rule: Rule[Any], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_rule(rule)


ORDERED = [FedAvg(), IDA(), Median(), Krum(hostile=0), Plurality()]


@pytest.mark.parametrize("rule", ORDERED, ids=repr)
@given(seed=st.integers(0, 10_000), clients=st.integers(1, 8), data=st.data())
def test_the_order_of_replies_does_not_matter(rule: Rule[Any], seed: int, clients: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    origin = Model(torch.randn(7, generator=generator))
    replies = [Reply.of(f"site-{i}", torch.randn(7, generator=generator), 1 + 7 * i) for i in range(clients)]
    first = rule.aggregate(origin, list(replies), rule.initial())
    second = rule.aggregate(origin, data.draw(st.permutations(replies)), rule.initial())
    assert torch.equal(first.model.parameters, second.model.parameters)
    assert first.weights == second.weights


WEIGHTED = ["fedavg", "fedau", "ida", "krum", "geometric_median", "fltrust", "fedlaw", "mifa", "fedvarp"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_recorded_weights_reproduce_the_model(name: str) -> None:
    """A weight is the factor of a client's model in the next one. The old model has the rest, except in FedLAW."""
    rule, origin = make_rule(name), first_model()
    replies = replies_to(origin)
    outcome = one_round(rule, origin, list(replies))
    total = sum(outcome.weights.values())
    if name == "geometric_median":
        assert total == pytest.approx(1)
    mixed = sum(outcome.weights[r.report.node] * r.parts[0] for r in replies)
    if name == "fedlaw":
        assert total == pytest.approx(outcome.notes["gamma"], rel=1e-5)
    else:
        mixed = mixed + (1 - total) * origin.parameters
    torch.testing.assert_close(outcome.model.parameters, mixed)


def test_voters_keep_their_newest_models() -> None:
    rule, origin = Plurality(), Model(vector(0.0))
    memory = rule.aggregate(origin, [Reply.of("a", vector(1.0)), Reply.of("b", vector(2.0))], rule.initial()).memory
    memory = rule.aggregate(origin, [Reply.of("b", vector(3.0)), Reply.of("c", vector(4.0))], memory).memory
    assert memory.nodes == ("a", "b", "c")
    assert memory.models is not None
    assert memory.models[:, 0].tolist() == [1, 3, 4]
    twice = Plurality(versions=2)
    memory = twice.initial()
    for value in (1.0, 2.0, 3.0):
        memory = twice.aggregate(origin, [Reply.of("b", vector(value))], memory).memory
    assert memory.nodes == ("b", "b")
    assert memory.models is not None
    assert memory.models[:, 0].tolist() == [2, 3]


def test_a_hostile_client_changes_only_its_own_groups() -> None:
    """Each group continues from its own model, over many rounds."""
    rule, origin = RunOff(groups=6, spread=2), Model(vector(0.0))
    sites = [f"site-{i}" for i in range(20)]

    def trained(hostile: str | None) -> Tensor:
        memory = rule.initial()
        for _ in range(6):
            replies = [
                Reply.of(s, rule.model_for(s, origin, memory).parameters + (1e9 if s == hostile else 1.0))
                for s in sites
            ]
            memory = rule.aggregate(origin, replies, memory).memory
        assert memory.models is not None
        models: Tensor = memory.models
        return models

    clean = trained(None)
    for hostile in sites[:5]:
        changed = (trained(hostile) != clean).any(dim=1).nonzero()[:, 0].tolist()
        bucket = rule.group_of(hostile, 0) - rule.shifts[0]
        assert set(changed) <= {(bucket + shift) % 6 for shift in rule.shifts}
        assert changed


def test_zero_and_huge_numbers_of_examples() -> None:
    origin = Model(torch.zeros(2))
    rule = make_rule("fedavg")
    without_examples = rule.aggregate(origin, [Reply.of("a", torch.ones(2), 0)], None)
    assert without_examples.model.parameters.tolist() == [0, 0]
    replies = [Reply.of("a", torch.ones(2), 2**53), Reply.of("b", torch.zeros(2), 1)]
    assert rule.aggregate(origin, replies, None).model.parameters.tolist() == [1, 1]


def test_unknown_names_list_the_known_ones() -> None:
    known = r"Unknown rule 'fedavgg'\. Did you mean 'fedavg'\? Known names: .*fedau, fedavg, fedda"
    with pytest.raises(ValueError, match=known):
        make_rule("fedavgg")
    with pytest.raises(ValueError, match=r"Rule 'fedau' has no parameter 'cutof'\. Did you mean 'cutoff'"):
        make_rule("fedau", cutof=3)
    for wrong in ({"cutoff": "many"}, {"cutoff": 2.5}, {"by_examples": "no"}, {"population": 2.5}, {"cutoff": -1}):
        with pytest.raises(ValueError, match=f"'fedau' cannot be built with .*{next(iter(wrong))}"):
            make_rule("fedau", **wrong)
    assert make_rule("fedau", server_rate=1) == make_rule("fedau")


def test_a_rule_may_be_a_parameter() -> None:
    assert make_rule("layerwise", rule={"name": "krum", "hostile": 2}) == make_rule("layerwise", rule=Krum(hostile=2))
    with pytest.raises(ValueError, match=r"rule: FedAvg.* is not a SightedRule"):
        make_rule("layerwise", rule="fedavg")
    with pytest.raises(ValueError, match="keeps a memory"):
        make_rule("layerwise", rule="foolsgold")


def test_every_rule_has_a_name() -> None:
    assert known_rules().keys() >= RULES.keys()


@dataclass(frozen=True)
class Returns(SightedRule[None]):
    """Returns the given `result` from `mix`."""

    result: Any = None

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """See `SightedRule.mix`."""
        result: Mix[None] = self.result
        return result


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ((torch.zeros(2), None), TypeError, r"mix returned a tuple, not a Mix; write `return Mix\(vector, memory\)`"),
        (Mix(torch.zeros(3)), ValueError, r"mix returned vector of shape \[3\]; return shape \[2\]"),
        (Mix([0.0, 0.0]), TypeError, "mix returned vector of type list; return a torch.Tensor"),  # type: ignore[arg-type]
        (Mix(torch.zeros(2), weights=torch.ones(2)), ValueError, r"weights of shape \[2\]; return shape \[1\]"),
    ],
)
def test_the_result_of_mix_is_validated(result: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Returns(result).aggregate(Model(torch.zeros(2)), [Reply.of("a", torch.ones(2))], None)


@dataclass(frozen=True)
class Weighs(BlindRule[None]):
    """Returns a weight that is not a number."""

    def weight(self, report: Report, memory: None) -> float:
        """See `BlindRule.weight`."""
        return float("nan")


def test_a_weight_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Weighs\(\)\.weight returned nan for a; return a finite number"):
        Weighs().aggregate(Model(torch.zeros(2)), [Reply.of("a", torch.ones(2))], None)
