"""The requirements on rules, one check function for each; `corymb.testing.check_rule` runs them all."""

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
    close,
    equal_memories,
    first_model,
    learnt_vector,
    make_module,
    make_proxy,
    one_round,
    replies_to,
    with_parts,
)  # fmt: skip
from corymb.strategies import BlindRule, Layout, Outcome, Reply, Rule, SightedRule, VotingRule
from corymb.strategies.core.rows import SingleRow
from corymb.strategies.core.serialization import pack_memory, unpack_memory

MAX_MOVE = 10.0  # under attack, the model may move by this multiple of the longest honest update


def check_frozen_dataclass(rule: Rule[Any]) -> None:
    """The rule is a frozen dataclass with a docstring."""
    kind = type(rule)
    assert is_dataclass(kind), f"{kind.__name__} is not a dataclass; decorate it with @dataclass(frozen=True)."
    assert kind.__doc__, f"{kind.__name__} has no docstring; begin it with the authors, the year and the idea."
    try:
        rule.anything = 1  # type: ignore[attr-defined]
    except AttributeError:
        return
    raise AssertionError(f"{kind.__name__} is not frozen; decorate it with @dataclass(frozen=True).")


def check_reply_order(rule: Rule[Any]) -> None:
    """The order of the replies has no effect on the outcome."""
    origin = first_model()
    replies = replies_to(origin)
    one, two = one_round(rule, origin, list(replies)), one_round(rule, origin, [*replies[5:], *replies[:5][::-1]])
    assert torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)), (
        f"{rule}: the model depends on the order of the replies."
    )
    assert torch.equal(one.model.buffers, two.model.buffers), f"{rule}: the buffers depend on the order of the replies."
    assert one.weights == two.weights, f"{rule}: the weights depend on the order of the replies."
    assert equal_memories(one.memory, two.memory), f"{rule}: the memory depends on the order of the replies."


def check_model_parts(rule: Rule[Any]) -> None:
    """The model does not depend on how replies are cut into parts."""
    origin = first_model()
    edges = [0, 3, 3, 20, origin.parameters.numel()]
    replies = replies_to(origin)
    cut = [with_parts(r, *(r.parts[0][a:b] for a, b in pairwise(edges))) for r in replies]
    one, two = one_round(rule, origin, replies), one_round(rule, origin, cut)
    assert torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)), (
        f"{rule}: the model depends on the parts that replies are cut into."
    )


def check_empty_round(rule: Rule[Any]) -> None:
    """A round without replies keeps the model, unless the rule acts without replies."""
    origin = first_model()
    outcome = one_round(rule, origin, [])
    if isinstance(rule, SightedRule) and rule.runs_without_replies:
        assert outcome.model.parameters.isfinite().all(), (
            f"{rule}: after a round without replies, the model is not finite."
        )
    else:
        assert outcome.model is origin, f"{rule}: a round without replies changes the model."
    assert not outcome.weights, f"{rule}: a round without replies has weights."


def check_single_reply(rule: Rule[Any]) -> None:
    """If the rule preserves consensus, a single reply is the next model; a voting rule keeps the old model."""
    origin = first_model()
    replies = replies_to(origin, clients=1)
    outcome = one_round(rule, origin, replies, known=())
    if rule.preserves_consensus:
        expected = origin.parameters if isinstance(rule, VotingRule) else replies[0].parts[0]
        model = outcome.model.parameters
        assert close(model, expected), (
            f"{rule}: the next model differs from the only reply; if that is "
            "intended, declare preserves_consensus = False."
        )
    assert learnt_vector(rule, outcome).isfinite().all(), f"{rule}: after a single reply, the model is not finite."


def check_unanimous(rule: Rule[Any]) -> None:
    """If the rule preserves consensus and all replies are equal, the next model equals them."""
    if not rule.preserves_consensus or isinstance(rule, VotingRule):
        return
    origin = first_model()
    same = [with_parts(r, *replies_to(origin)[0].parts) for r in replies_to(origin)]
    model = one_round(rule, origin, list(same)).model.parameters
    assert close(model, same[0].parts[0]), (
        f"{rule}: all replies are equal, and the next model differs from them; if that is intended, declare "
        "preserves_consensus = False."
    )


def check_equivariance(rule: Rule[Any]) -> None:
    """Shifting or scaling all models shifts or scales the outcome, if the rule declares so."""
    origin = first_model(torch.float64)
    replies = replies_to(origin)
    plain = learnt_vector(rule, one_round(rule, origin, list(replies)))
    for declared, name, factor, offset in (
        (rule.shift_equivariant, "shift", 1.0, 0.75),
        (rule.scale_equivariant, "scale", 4.0, 0.0),
    ):
        if declared:
            moved = [with_parts(r, factor * r.parts[0] + offset) for r in replies]
            start = replace(origin, parameters=factor * origin.parameters + offset)
            vector = learnt_vector(rule, one_round(rule, start, moved))
            same = close(vector, factor * plain + offset, 1e-9)
            assert same, f"{rule}: it is not {name}-equivariant; declare {name}_equivariant = False."


def check_example_counts(rule: Rule[Any]) -> None:
    """Replies that report 0 or 2**53 examples give finite numbers."""
    origin = first_model()
    for examples in (0, 2**53):
        for all_replies in (True, False):
            replies = [
                replace(r, report=replace(r.report, examples=examples if all_replies or i == 3 else 5))
                for i, r in enumerate(replies_to(origin))
            ]
            outcome = one_round(rule, origin, replies)
            assert learnt_vector(rule, outcome).isfinite().all(), (
                f"{rule}: {examples} examples give a model that is not finite."
            )
            assert all(map(isfinite, outcome.weights.values())), (
                f"{rule}: {examples} examples give weights that are not finite."
            )
            assert all(map(isfinite, outcome.notes.values())), (
                f"{rule}: {examples} examples give notes that are not finite."
            )


def check_zero_updates(rule: Rule[Any]) -> None:
    """Replies that equal the model that was sent give finite numbers."""
    origin = first_model()
    unchanged = [with_parts(r, origin.parameters.clone()) for r in replies_to(origin)]
    for replies in (unchanged, [*unchanged[:3], *replies_to(origin)[3:]]):
        outcome = one_round(rule, origin, list(replies))
        assert learnt_vector(rule, outcome).isfinite().all(), f"{rule}: zero updates give a model that is not finite."


def check_inputs_unchanged(rule: Rule[Any]) -> None:
    """The rule does not modify the models and the memory that are passed to it."""
    origin = first_model()
    replies = replies_to(origin)
    memory = one_round(rule, origin, list(replies)).memory
    plain, tensors = pack_memory(memory)
    plain, tensors = json.loads(json.dumps(plain)), {name: tensor.clone() for name, tensor in tensors.items()}
    values = [origin.parameters, origin.buffers, *(r.parts[0] for r in replies), *(r.buffers for r in replies)]
    before = [value.clone() for value in values]
    one_round(rule, origin, list(replies), memory)
    assert all(map(torch.equal, before, values)), f"{rule}: it modifies the models that are passed to it."
    assert equal_memories(unpack_memory(rule.initial(), plain, tensors), memory), (
        f"{rule}: it modifies the memory that is passed to it."
    )


def check_proxy_unchanged(rule: Rule[Any]) -> None:
    """The rule does not modify the proxy data and the proxy module."""
    origin, proxy = first_model(), make_proxy()
    values = [proxy.inputs, proxy.labels, *proxy.module.state_dict().values()]
    before = [value.clone() for value in values]
    modes = [module.training for module in proxy.module.modules()]
    rule.aggregate(origin, replies_to(origin), rule.initial(), (), proxy)
    assert all(map(torch.equal, before, values)), f"{rule}: it modifies the proxy data or the proxy module."
    assert modes == [m.training for m in proxy.module.modules()], (
        f"{rule}: it changes the training mode of the proxy module."
    )


def check_resumed_run(rule: Rule[Any]) -> None:
    """A run whose memory goes through JSON and safetensors after each round is bitwise equal to one without that."""
    outcomes = []
    for is_resumed in (False, True):
        origin, memory = first_model(), rule.initial()
        for number, selection in enumerate((slice(None), slice(2, 7), slice(0, 9, 2), slice(4))):
            outcome = one_round(rule, origin, replies_to(origin, number)[selection], memory)
            origin, memory = outcome.model, outcome.memory
            if is_resumed:
                plain, tensors = pack_memory(memory)
                stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
                memory = unpack_memory(rule.initial(), json.loads(json.dumps(plain)), load(stored))
        outcomes.append(Outcome(origin, memory))
    one, two = outcomes
    same = torch.equal(one.model.parameters, two.model.parameters) and equal_memories(one.memory, two.memory)
    assert same, f"{rule}: a run that is resumed from stored memory differs from one that is not."


def check_half_precision(rule: Rule[Any]) -> None:
    """Replies in half precision are read exactly, and the model keeps its dtypes."""
    for dtype in (torch.float16, torch.bfloat16):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in make_module().state_dict().items()}
        layout = Layout.of(state)
        origin = layout.flatten(state)
        halves = [with_parts(r, r.parts[0].to(dtype)) for r in replies_to(origin)]
        singles = [with_parts(r, r.parts[0].float()) for r in halves]
        one, two = one_round(rule, origin, halves), one_round(rule, origin, singles)
        assert torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)), (
            f"{rule}: {dtype} replies and equal float32 replies give different models."
        )
        restored = layout.restore(one.model)
        same = {name: tensor.dtype for name, tensor in restored.items()} == {n: t.dtype for n, t in state.items()}
        assert same, f"{rule}: the dtypes of a {dtype} model change."
        assert torch.equal(restored["1.num_batches_tracked"], state["1.num_batches_tracked"]), (
            f"{rule}: integer buffers change."
        )


def check_tolerated_attacks(rule: Rule[Any]) -> None:
    """As many hostile replies as `tolerates` declares cannot move the model far.

    The attacks differ in length and direction, in the numbers of the hostile clients, and in whether the round is the
    first one.
    """
    origin = first_model()
    honest = replies_to(origin)
    hostile = rule.tolerates(CLIENTS)
    if not hostile:
        return
    memory = one_round(rule, origin, replies_to(origin, 1)).memory
    limit = MAX_MOVE * max(1.0, *(float((r.parts[0] - origin.parameters).norm()) for r in honest))
    ones = torch.ones_like(origin.parameters)
    attacks: dict[str, Callable[[int, Tensor], Tensor]] = {
        f"all shifted by {length:g}": lambda i, model, length=length: origin.parameters + length * ones  # type: ignore[misc]
        for length in (3, 30, 300, 1e4, 1e19)
    }
    attacks["each shifted differently"] = lambda i, model: (
        origin.parameters + 1e4 * (i + 1) * (model - origin.parameters)
    )
    attacks["updates reversed"] = lambda i, model: origin.parameters - 1e3 * (model - origin.parameters)
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
            replies_text = f"{hostile} hostile replies of {CLIENTS} ({name}, from reply {first} on)"
            assert moved <= limit, (
                f"{rule}: {replies_text} move the model by {moved:g}, more than {limit:g}; tolerates is too high."
            )
            assert float(model.buffers.abs().max()) <= 1e6, f"{rule}: {replies_text} move the buffers beyond 1e6."


def check_privacy_modes(rule: Rule[Any]) -> None:
    """Only a rule that sees no models declares the privacy mode "masked"."""
    masked = "masked" in rule.privacy_modes
    assert masked <= isinstance(rule, BlindRule), f"{rule}: it sees models, so privacy_modes cannot contain 'masked'."
