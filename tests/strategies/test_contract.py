"""What every rule of ours promises."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from corymb.strategies import (
    RULES,
    BlindRule,
    ElectingRule,
    Model,
    Reply,
    Rule,
    known_rules,
    make_rule,
)
from corymb.strategies.memory import packed, unpacked


@dataclass(frozen=True)
class Plurality(ElectingRule):
    """The class that most voters score highest; the smallest of equals."""

    def elect(self, scores: Tensor) -> Tensor:
        """See `ElectingRule.elect`."""
        ballots = torch.nn.functional.one_hot(scores.argmax(dim=2), scores.shape[2])
        return ballots.sum(dim=0).argmax(dim=1)


ALL: list[type[Rule[Any]]] = [*RULES.values(), Plurality]
rules = pytest.mark.parametrize("rule", [kind() for kind in ALL], ids=lambda rule: type(rule).__name__)


def cohort(seed: int, clients: int, size: int = 7) -> tuple[Model, list[Reply]]:
    generator = torch.Generator().manual_seed(seed)
    origin = Model(torch.randn(size, generator=generator), torch.randn(3, generator=generator), {"n": torch.tensor(5)})
    replies = [
        Reply.of(f"site-{i}", torch.randn(size, generator=generator), 1 + i * 7, {"accuracy": 0.5})
        for i in range(clients)
    ]
    return origin, [Reply(r.report, r.parts, torch.randn(3, generator=generator)) for r in replies]


@rules
@given(seed=st.integers(0, 10_000), clients=st.integers(1, 8), data=st.data())
def test_the_order_of_replies_does_not_matter(rule: Rule[Any], seed: int, clients: int, data: st.DataObject) -> None:
    origin, replies = cohort(seed, clients)
    shuffled = data.draw(st.permutations(replies))
    first = rule.aggregate(origin, replies, rule.initial())
    second = rule.aggregate(origin, shuffled, rule.initial())
    assert torch.equal(first.model.parameters, second.model.parameters)
    assert torch.equal(first.model.buffers, second.model.buffers)
    assert first.weights == second.weights
    assert same(first.memory, second.memory)


@rules
def test_an_empty_round_changes_nothing(rule: Rule[Any]) -> None:
    origin, _ = cohort(0, 1)
    outcome = rule.aggregate(origin, [], rule.initial(), ["a", "b"])
    assert outcome.model is origin
    assert outcome.weights == {}


@rules
def test_a_single_site_gets_its_model(rule: Rule[Any]) -> None:
    origin, replies = cohort(1, 1)
    model = rule.aggregate(origin, replies, rule.initial()).model
    if isinstance(rule, ElectingRule):
        assert model is origin
    else:
        torch.testing.assert_close(model.parameters, replies[0].parts[0])
        torch.testing.assert_close(model.buffers, replies[0].buffers)


@rules
def test_inputs_are_left_as_they_were(rule: Rule[Any]) -> None:
    origin, replies = cohort(2, 5)
    memory = rule.aggregate(origin, replies, rule.initial()).memory
    before = [t.clone() for t in (origin.parameters, origin.buffers, *(r.parts[0] for r in replies))]
    plain, tensors = packed(memory)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    rule.aggregate(origin, replies, memory)
    for old, new in zip(before, (origin.parameters, origin.buffers, *(r.parts[0] for r in replies)), strict=True):
        assert torch.equal(old, new)
    assert same(unpacked(rule.initial(), plain, tensors), memory)


@rules
def test_memory_survives_json_and_safetensors(rule: Rule[Any]) -> None:
    origin, replies = cohort(3, 4)
    memory = rule.aggregate(origin, replies, rule.initial(), ["late", "site-0"]).memory
    plain, tensors = packed(memory)
    restored = unpacked(rule.initial(), json.loads(json.dumps(plain)), load(save(tensors)) if tensors else {})
    assert same(memory, restored)
    one, two = (rule.aggregate(origin, replies[:2], m) for m in (memory, restored))
    assert torch.equal(one.model.parameters, two.model.parameters)


@rules
def test_half_precision_replies_are_read_as_they_are(rule: Rule[Any]) -> None:
    origin, replies = cohort(4, 3)
    for dtype in (torch.float16, torch.bfloat16):
        halves = [Reply(r.report, (r.parts[0].to(dtype),), r.buffers) for r in replies]
        singles = [Reply(r.report, (r.parts[0].to(dtype).float(),), r.buffers) for r in replies]
        one, two = (rule.aggregate(origin, some, rule.initial()).model.parameters for some in (halves, singles))
        assert torch.equal(one, two)


@rules
@given(cuts=st.lists(st.integers(0, 7), max_size=4))
def test_how_a_model_is_cut_into_pieces_does_not_matter(rule: Rule[Any], cuts: list[int]) -> None:
    origin, replies = cohort(5, 4)
    edges = [0, *sorted(cuts), 7]
    pieces = [
        Reply(
            r.report,
            tuple(r.parts[0][a:b] for a, b in pairwise(edges)),
            r.buffers,
        )
        for r in replies
    ]
    one, two = (rule.aggregate(origin, some, rule.initial()) for some in (replies, pieces))
    assert torch.equal(one.model.parameters, two.model.parameters)


@rules
def test_weights_are_recorded_and_make_the_model(rule: Rule[Any]) -> None:
    origin, replies = cohort(6, 5)
    outcome = rule.aggregate(origin, replies, rule.initial())
    if not outcome.weights:
        assert type(rule).__name__ in ("TrimmedMean", "Median", "Plurality")
        return
    moved = sum(outcome.weights[r.report.node] * (r.parts[0] - origin.parameters) for r in replies)
    torch.testing.assert_close(outcome.model.parameters, origin.parameters + moved)


@rules
def test_it_is_a_frozen_record_of_its_settings(rule: Rule[Any]) -> None:
    assert type(rule).__doc__
    assert eval(repr(rule), {type(rule).__name__: type(rule)}) == rule
    with pytest.raises(AttributeError):
        rule.anything = 1  # type: ignore[attr-defined]


@rules
def test_only_blind_rules_serve_masked_runs(rule: Rule[Any]) -> None:
    assert ("masked" in rule.privacy_modes) == isinstance(rule, BlindRule)


def test_voters_keep_their_newest_models() -> None:
    rule = Plurality()
    origin, replies = cohort(7, 3)
    memory = rule.aggregate(origin, replies[:2], rule.initial()).memory
    newer = Reply.of("site-1", torch.ones(7))
    memory = rule.aggregate(origin, [newer, replies[2]], memory).memory
    assert memory.nodes == ("site-0", "site-1", "site-2")
    assert memory.models is not None
    assert torch.equal(memory.models, torch.stack([replies[0].parts[0], torch.ones(7), replies[2].parts[0]]))
    scores = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]], [[0.4, 0.6]]])
    assert rule.elect(scores).tolist() == [1]


def test_a_zero_weight_and_a_huge_one() -> None:
    origin = Model(torch.zeros(2))
    rule = make_rule("fedavg")
    nobody = rule.aggregate(origin, [Reply.of("a", torch.ones(2), 0)], None)
    assert nobody.model.parameters.tolist() == [0, 0]
    replies = [Reply.of("a", torch.ones(2), 2**53), Reply.of("b", torch.zeros(2), 1)]
    assert rule.aggregate(origin, replies, None).model.parameters.tolist() == [1, 1]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no rule 'fedavgg'; the known rules are fedau, fedavg, ida"):
        make_rule("fedavgg")
    with pytest.raises(ValueError, match="no parameter 'cutof'; its parameters are cutoff, population"):
        make_rule("fedau", cutof=3)
    for wrong in ({"cutoff": "many"}, {"cutoff": 2.5}, {"by_examples": "no"}, {"population": 2.5}, {"cutoff": -1}):
        with pytest.raises(ValueError, match=f"'fedau' cannot be made with .*{next(iter(wrong))}"):
            make_rule("fedau", **wrong)
    assert make_rule("fedau", server_rate=1) == make_rule("fedau")


def test_every_rule_has_a_name() -> None:
    assert known_rules().keys() >= RULES.keys()


def same(one: Any, two: Any) -> bool:
    """Equal, tensors included."""
    if not is_dataclass(one):
        return bool(one == two)
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
