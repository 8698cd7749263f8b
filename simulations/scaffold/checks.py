"""The requirements on all rules, one check function for each; `corymb.testing.check_rule` runs them all."""

from __future__ import annotations

import json
import random
from dataclasses import is_dataclass, replace
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from corymb.simulations.scaffold.fixtures import (
    close,
    equal_memories,
    first_model,
    learnt_vector,
    make_module,
    make_proxy,
    one_round,
    replies_to,
    with_needed_metrics,
    with_parts,
)  # fmt: skip
from corymb.strategies import Layout, Outcome, Rule, SightedRule
from corymb.strategies.core.serialization import pack_memory, unpack_memory


def require(holds: object, problem: str) -> None:
    """Raise `AssertionError` unless the requirement `holds`. Unlike `assert`, this also works under `python -O`."""
    if not holds:
        raise AssertionError(problem)


def check_frozen_dataclass(rule: Rule[Any]) -> None:
    """The rule is a frozen dataclass with a docstring."""
    kind = type(rule)
    require(is_dataclass(kind), f"{kind.__name__} is not a dataclass; decorate it with @dataclass(frozen=True).")
    require(kind.__doc__, f"{kind.__name__} has no docstring; begin it with the authors, the year and the idea.")
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
    require(
        torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)),
        f"{rule}: the model depends on the order of the replies.",
    )
    require(
        torch.equal(one.model.buffers, two.model.buffers), f"{rule}: the buffers depend on the order of the replies."
    )
    require(one.weights == two.weights, f"{rule}: the weights depend on the order of the replies.")
    require(equal_memories(one.memory, two.memory), f"{rule}: the memory depends on the order of the replies.")


def check_repeatability(rule: Rule[Any]) -> None:
    """The same round gives the same outcome again, whatever random numbers others draw in between."""
    origin = first_model()
    outcomes = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # a rule may use the global generator, which this check is to find
        random.seed(seed)
        outcomes.append(one_round(rule, origin, replies_to(origin)))
    one, two = outcomes
    require(
        torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)) and one.weights == two.weights,
        f"{rule}: the same round gives another model or other weights when it is repeated; keep no state outside of "
        "the memory, and draw random numbers from a generator with a seed of its own.",
    )


def check_recorded_weights(rule: Rule[Any]) -> None:
    """The next model is `rest + sum_k weight_k * model_k` with the recorded weights; see `Outcome`.

    From a zero origin without memory, `rest` must be the same for any two sets of replies.
    """
    origin = first_model(torch.float64)
    origin = replace(origin, parameters=torch.zeros_like(origin.parameters))
    rests = []
    for seed in (0, 1):
        replies = replies_to(origin, seed)
        models = torch.stack([reply.parts[0] for reply in replies])
        outcome = one_round(rule, origin, replies)
        if not outcome.weights:
            return
        weights = torch.tensor([outcome.weights[reply.report.node] for reply in replies], dtype=torch.float64)
        rests.append(outcome.model.parameters - weights @ models)
    require(
        close(rests[0], rests[1], 1e-6),
        f"{rule}: the next model is not a constant plus the models times the recorded weights; return the weights that "
        "the models were multiplied with, or none.",
    )


def check_extreme_reply(rule: Rule[Any]) -> None:
    """A single reply with values near the door's bound of 1e20 does not make the model NaN."""
    origin = first_model()
    for seed in (0, 1):
        replies = replies_to(origin, seed)
        replies[4] = with_parts(replies[4], torch.full_like(origin.parameters, 9e19))
        outcome = one_round(rule, origin, list(replies))
        require(
            bool(learnt_vector(rule, outcome).isfinite().all()),
            f"{rule}: one reply whose values are 9e19 makes the model NaN or infinite; compute squares in float64.",
        )


def check_model_parts(rule: Rule[Any]) -> None:
    """The model does not depend on how replies are cut into parts."""
    origin = first_model()
    edges = [0, 3, 3, 20, origin.parameters.numel()]
    replies = replies_to(origin)
    cut = [with_parts(r, *(r.parts[0][a:b] for a, b in pairwise(edges))) for r in replies]
    one, two = one_round(rule, origin, replies), one_round(rule, origin, cut)
    require(
        torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)),
        f"{rule}: the model depends on the parts that replies are cut into.",
    )


def check_empty_round(rule: Rule[Any]) -> None:
    """A round without replies keeps the model, unless the rule acts without replies."""
    origin = first_model()
    outcome = one_round(rule, origin, [])
    if isinstance(rule, SightedRule) and rule.runs_without_replies:
        require(
            outcome.model.parameters.isfinite().all(),
            f"{rule}: after a round without replies, the model is not finite.",
        )
    else:
        require(outcome.model is origin, f"{rule}: a round without replies changes the model.")
    require(not outcome.weights, f"{rule}: a round without replies has weights.")


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
            require(
                learnt_vector(rule, outcome).isfinite().all(),
                f"{rule}: {examples} examples give a model that is not finite.",
            )
            require(
                all(map(isfinite, outcome.weights.values())),
                f"{rule}: {examples} examples give weights that are not finite.",
            )
            require(
                all(map(isfinite, outcome.notes.values())),
                f"{rule}: {examples} examples give notes that are not finite.",
            )


def check_zero_updates(rule: Rule[Any]) -> None:
    """Replies that equal the model that was sent give finite numbers."""
    origin = first_model()
    unchanged = [with_parts(r, origin.parameters.clone()) for r in replies_to(origin)]
    for replies in (unchanged, [*unchanged[:3], *replies_to(origin)[3:]]):
        outcome = one_round(rule, origin, list(replies))
        require(
            learnt_vector(rule, outcome).isfinite().all(),
            f"{rule}: zero updates give a model that is not finite.",
        )


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
    require(all(map(torch.equal, before, values)), f"{rule}: it modifies the models that are passed to it.")
    require(
        equal_memories(unpack_memory(rule.initial(), plain, tensors), memory),
        f"{rule}: it modifies the memory that is passed to it.",
    )


def check_proxy_unchanged(rule: Rule[Any]) -> None:
    """The rule does not modify the proxy data and the proxy module."""
    origin, proxy = first_model(), make_proxy()
    values = [proxy.inputs, proxy.labels, *proxy.module.state_dict().values()]
    before = [value.clone() for value in values]
    modes = [module.training for module in proxy.module.modules()]
    replies = [with_needed_metrics(reply, rule) for reply in replies_to(origin)]
    rule.aggregate(origin, replies, rule.initial(), (), proxy)
    require(all(map(torch.equal, before, values)), f"{rule}: it modifies the proxy data or the proxy module.")
    same_modes = modes == [m.training for m in proxy.module.modules()]
    require(same_modes, f"{rule}: it changes the training mode of the proxy module.")


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
    require(same, f"{rule}: a run that is resumed from stored memory differs from one that is not.")


def check_half_precision(rule: Rule[Any]) -> None:
    """Replies in half precision are read exactly, and the model keeps its dtypes."""
    for dtype in (torch.float16, torch.bfloat16):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in make_module().state_dict().items()}
        layout = Layout.of(state)
        origin = layout.flatten(state)
        halves = [with_parts(r, r.parts[0].to(dtype)) for r in replies_to(origin)]
        singles = [with_parts(r, r.parts[0].float()) for r in halves]
        one, two = one_round(rule, origin, halves), one_round(rule, origin, singles)
        require(
            torch.equal(learnt_vector(rule, one), learnt_vector(rule, two)),
            f"{rule}: {dtype} replies and equal float32 replies give different models.",
        )
        restored = layout.restore(one.model)
        same = {name: tensor.dtype for name, tensor in restored.items()} == {n: t.dtype for n, t in state.items()}
        require(same, f"{rule}: the dtypes of a {dtype} model change.")
        require(
            torch.equal(restored["1.num_batches_tracked"], state["1.num_batches_tracked"]),
            f"{rule}: integer buffers change.",
        )
