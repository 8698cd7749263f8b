"""What every rule promises, one function for each promise; `corymb.testing.check_rule` tries them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from corymb.simulations.scaffold.fixtures import (
    CLIENTS,
    alike,
    close,
    first_model,
    learnt,
    make_module,
    make_proxy,
    one_round,
    replies_to,
    with_parts,
)  # fmt: skip
from corymb.strategies import BlindRule, Layout, Outcome, Reply, Rule, SightedRule, VotingRule
from corymb.strategies.core.rows import SingleRow
from corymb.strategies.core.serialization import packed, unpacked

FAR = 10.0  # times the longest honest update: beyond it a model was carried away


def it_is_a_frozen_record_of_its_settings(rule: Rule[Any]) -> None:
    kind = type(rule)
    assert is_dataclass(kind), f"{kind.__name__} is no dataclass; write @dataclass(frozen=True) above it."
    assert kind.__doc__, f"{kind.__name__} has no docstring; begin it with the author, the year and the idea."
    try:
        rule.anything = 1  # type: ignore[attr-defined]
    except AttributeError:
        return
    raise AssertionError(f"{kind.__name__} can be changed; write @dataclass(frozen=True) above it.")


def the_order_of_replies_does_not_matter(rule: Rule[Any]) -> None:
    origin = first_model()
    replies = replies_to(origin)
    one, two = one_round(rule, origin, list(replies)), one_round(rule, origin, [*replies[5:], *replies[:5][::-1]])
    assert torch.equal(learnt(rule, one), learnt(rule, two)), f"{rule}: another order of replies, another model."
    assert torch.equal(one.model.buffers, two.model.buffers), f"{rule}: another order of replies, other buffers."
    assert one.weights == two.weights, f"{rule}: another order of replies, other weights."
    assert alike(one.memory, two.memory), f"{rule}: another order of replies, another memory."


def how_a_model_is_cut_does_not_matter(rule: Rule[Any]) -> None:
    origin = first_model()
    edges = [0, 3, 3, 20, origin.parameters.numel()]
    replies = replies_to(origin)
    cut = [with_parts(r, *(r.parts[0][a:b] for a, b in pairwise(edges))) for r in replies]
    one, two = one_round(rule, origin, replies), one_round(rule, origin, cut)
    assert torch.equal(learnt(rule, one), learnt(rule, two)), f"{rule}: models cut into pieces give another model."


def an_empty_round_keeps_the_model(rule: Rule[Any]) -> None:
    origin = first_model()
    outcome = one_round(rule, origin, [])
    if isinstance(rule, SightedRule) and rule.acts_alone:
        assert outcome.model.parameters.isfinite().all(), f"{rule}: an empty round gives a model that is not finite."
    else:
        assert outcome.model is origin, f"{rule}: a round without replies changes the model."
    assert not outcome.weights, f"{rule}: a round without replies has weights."


def a_single_site_gets_its_model(rule: Rule[Any]) -> None:
    origin = first_model()
    replies = replies_to(origin, clients=1)
    outcome = one_round(rule, origin, replies, known=())
    if rule.unanimous:
        expected = origin.parameters if isinstance(rule, VotingRule) else replies[0].parts[0]
        found = outcome.model.parameters
        assert close(found, expected), f"{rule}: a single site does not get its own model; is it unanimous?"
    assert learnt(rule, outcome).isfinite().all(), f"{rule}: a single site makes a model that is not finite."


def replies_that_agree_are_the_model(rule: Rule[Any]) -> None:
    if not rule.unanimous or isinstance(rule, VotingRule):
        return
    origin = first_model()
    same = [with_parts(r, *replies_to(origin)[0].parts) for r in replies_to(origin)]
    found = one_round(rule, origin, list(same)).model.parameters
    assert close(found, same[0].parts[0]), f"{rule}: all sites agree and the model is another; is it unanimous?"


def it_moves_and_scales_with_the_models(rule: Rule[Any]) -> None:
    origin = first_model(torch.float64)
    replies = replies_to(origin)
    plain = learnt(rule, one_round(rule, origin, list(replies)))
    for declared, what, factor, offset in (
        (rule.shift_equivariant, "shift", 1.0, 0.75),
        (rule.scale_equivariant, "scale", 4.0, 0.0),
    ):
        if declared:
            moved = [with_parts(r, factor * r.parts[0] + offset) for r in replies]
            start = replace(origin, parameters=factor * origin.parameters + offset)
            found = learnt(rule, one_round(rule, start, moved))
            same = close(found, factor * plain + offset, 1e-9)
            assert same, f"{rule}: it is not {what}-equivariant; declare it so."


def zero_and_huge_counts_of_examples_are_harmless(rule: Rule[Any]) -> None:
    origin = first_model()
    for examples in (0, 2**53):
        for everybody in (True, False):
            replies = [
                replace(r, report=replace(r.report, examples=examples if everybody or i == 3 else 5))
                for i, r in enumerate(replies_to(origin))
            ]
            outcome = one_round(rule, origin, replies)
            assert learnt(rule, outcome).isfinite().all(), f"{rule}: sites with {examples} examples spoil the model."
            assert all(map(isfinite, outcome.weights.values())), f"{rule}: {examples} examples give weights of NaN."
            assert all(map(isfinite, outcome.notes.values())), f"{rule}: {examples} examples give notes of NaN."


def sites_that_stand_still_are_harmless(rule: Rule[Any]) -> None:
    origin = first_model()
    still = [with_parts(r, origin.parameters.clone()) for r in replies_to(origin)]
    for replies in (still, [*still[:3], *replies_to(origin)[3:]]):
        outcome = one_round(rule, origin, list(replies))
        assert learnt(rule, outcome).isfinite().all(), f"{rule}: sites that send the model back unchanged spoil it."


def inputs_are_left_as_they_were(rule: Rule[Any]) -> None:
    origin = first_model()
    replies = replies_to(origin)
    memory = one_round(rule, origin, list(replies)).memory
    plain, tensors = packed(memory)
    plain, tensors = json.loads(json.dumps(plain)), {name: tensor.clone() for name, tensor in tensors.items()}
    values = [origin.parameters, origin.buffers, *(r.parts[0] for r in replies), *(r.buffers for r in replies)]
    before = [value.clone() for value in values]
    one_round(rule, origin, list(replies), memory)
    assert all(map(torch.equal, before, values)), f"{rule}: it changes the models that it is given."
    assert alike(unpacked(rule.initial(), plain, tensors), memory), f"{rule}: it changes the memory that it is given."


def the_servers_data_are_left_as_they_were(rule: Rule[Any]) -> None:
    origin, proxy = first_model(), make_proxy()
    values = [proxy.inputs, proxy.labels, *proxy.module.state_dict().values()]
    before = [value.clone() for value in values]
    modes = [module.training for module in proxy.module.modules()]
    rule.aggregate(origin, replies_to(origin), rule.initial(), (), proxy)
    assert all(map(torch.equal, before, values)), f"{rule}: it changes the server's data or module."
    assert modes == [m.training for m in proxy.module.modules()], (
        f"{rule}: it leaves the server's module in another mode"
    )


def a_resumed_run_is_the_same(rule: Rule[Any]) -> None:
    """Memory survives JSON and safetensors, and the rounds after it are equal bit for bit."""
    outcomes = []
    for rests in (False, True):
        origin, memory = first_model(), rule.initial()
        for number, came in enumerate((slice(None), slice(2, 7), slice(0, 9, 2), slice(4))):
            outcome = one_round(rule, origin, replies_to(origin, number)[came], memory)
            origin, memory = outcome.model, outcome.memory
            if rests:
                plain, tensors = packed(memory)
                stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
                memory = unpacked(rule.initial(), json.loads(json.dumps(plain)), load(stored))
        outcomes.append(Outcome(origin, memory))
    one, two = outcomes
    same = torch.equal(one.model.parameters, two.model.parameters) and alike(one.memory, two.memory)
    assert same, f"{rule}: a run resumed from its stored memory is another run."


def half_precision_is_read_and_kept(rule: Rule[Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in make_module().state_dict().items()}
        layout = Layout.of(state)
        origin = layout.flatten(state)
        halves = [with_parts(r, r.parts[0].to(dtype)) for r in replies_to(origin)]
        singles = [with_parts(r, r.parts[0].float()) for r in halves]
        one, two = one_round(rule, origin, halves), one_round(rule, origin, singles)
        assert torch.equal(learnt(rule, one), learnt(rule, two)), f"{rule}: {dtype} replies are not read exactly."
        back = layout.restore(one.model)
        kept = {name: tensor.dtype for name, tensor in back.items()} == {n: t.dtype for n, t in state.items()}
        assert kept, f"{rule}: a model of {dtype} changes its dtypes."
        assert torch.equal(back["1.num_batches_tracked"], state["1.num_batches_tracked"]), f"{rule}: integers change."


def hostile_replies_that_it_tolerates_do_not_carry_it_away(rule: Rule[Any]) -> None:
    """Whoever they are, whatever their length, in the first round and in a later one."""
    origin = first_model()
    honest = replies_to(origin)
    hostile = rule.tolerates(CLIENTS)
    if not hostile:
        return
    memory = one_round(rule, origin, replies_to(origin, 1)).memory
    limit = FAR * max(1.0, *(float((r.parts[0] - origin.parameters).norm()) for r in honest))
    ones = torch.ones_like(origin.parameters)
    attacks: dict[str, Callable[[int, Tensor], Tensor]] = {
        f"{length:g} away together": lambda i, model, length=length: origin.parameters + length * ones  # type: ignore[misc]
        for length in (3, 30, 300, 1e4, 1e19)
    }
    attacks["each elsewhere"] = lambda i, model: origin.parameters + 1e4 * (i + 1) * (model - origin.parameters)
    attacks["backwards"] = lambda i, model: origin.parameters - 1e3 * (model - origin.parameters)
    for name, attack in attacks.items():
        for first, before in ((0, None), (CLIENTS - hostile, None), (2, memory)):
            rows = {(first + i) % CLIENTS for i in range(hostile)}
            replies = [
                Reply(
                    replace(r.report, examples=2**53, metrics={"accuracy": 1e99, "steps": -1e99}),
                    SingleRow((attack(i, r.parts[0]),)),
                    0,
                    torch.full_like(r.buffers, 1e19),
                )
                if i in rows
                else r
                for i, r in enumerate(honest)
            ]
            model = one_round(rule, origin, replies, before).model
            moved = float((model.parameters.double() - origin.parameters).norm())
            who = f"{hostile} of {CLIENTS} replies, from number {first} on, {name},"
            assert moved <= limit, f"{rule}: {who} move the model by {moved:g}."
            assert float(model.buffers.abs().max()) <= 1e6, f"{rule}: {who} carry the buffers away."


def it_serves_the_privacy_that_its_kind_can(rule: Rule[Any]) -> None:
    masked = "masked" in rule.privacy_modes
    assert masked <= isinstance(rule, BlindRule), f"{rule}: it looks at models, so it cannot serve masked runs."
