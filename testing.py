"""What every rule promises, as one call for any test suite: `corymb.testing.check_rule(MyRule())`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load, save
from torch import Tensor, nn

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy
from corymb.simulations.grid import LocalGrid
from corymb.strategies import (
    BlindRule,
    ElectingRule,
    Layout,
    Model,
    Outcome,
    Proxy,
    Reply,
    Report,
    Rule,
    SightedRule,
)
from corymb.strategies.memory import packed, unpacked

CLIENTS = 11  # enough for two hostile ones under Bulyan
FAR = 10.0  # times the longest honest update: beyond it a model was carried away


def check_rule(rule: Rule[Any]) -> None:
    """Raise `AssertionError` for the first promise that `rule` breaks, in a sentence that says which.

    The promises are those of all rules (order of replies, empty rounds, memory at rest, dtypes, ...) and what the
    rule declares: `unanimous`, `shift_equivariant`, `scale_equivariant`, `tolerates`. Sites are called "site-00"
    to "site-10", report "accuracy" and "steps", and a proxy with a small classifier is at hand.
    """
    for check in CHECKS:
        check(rule)


def _module() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def _proxy(dtype: torch.dtype = torch.float32) -> Proxy:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 4, generator=generator, dtype=torch.float64).to(dtype)
    return Proxy(_module().to(dtype), inputs, torch.arange(48) % 3)


def _origin(dtype: torch.dtype = torch.float32) -> Model:
    module = _module().to(dtype)
    return Layout.of_module(module).flatten(module.state_dict())


def _replies(origin: Model, seed: int = 0, clients: int = CLIENTS) -> list[Reply]:
    """Sites that move the same way, more or less."""
    generator = torch.Generator().manual_seed(seed)
    size = origin.parameters.numel()
    common = torch.randn(size, generator=generator)
    noise = 0.5 * torch.randn(clients, size, generator=generator)
    buffers = torch.rand(clients, origin.buffers.numel(), generator=generator)
    return [
        Reply(
            Report(f"site-{i:02d}", 1 + 7 * i, {"accuracy": 0.3 + i / 20, "steps": 5.0}),
            ((origin.parameters + 0.1 * (common + noise[i])).to(origin.parameters.dtype),),
            buffers[i].to(origin.buffers.dtype),
        )
        for i in range(clients)
    ]


def _round(rule: Rule[Any], origin: Model, replies: list[Reply], memory: Any = None, **options: Any) -> Outcome[Any]:
    """One round, of which every site is known."""
    known = [f"site-{i:02d}" for i in range(CLIENTS)]
    proxy = _proxy(origin.parameters.dtype)
    memory = rule.initial() if memory is None else memory
    return rule.aggregate(origin, replies, memory, options.get("known", known), proxy)


def _result(rule: Rule[Any], outcome: Outcome[Any]) -> Tensor:
    """What a round learnt as one vector: the model, or all voters'."""
    if isinstance(rule, ElectingRule) and outcome.memory.models is not None:
        models: Tensor = outcome.memory.models
        return models.reshape(-1)
    return outcome.model.parameters


def _alike(one: Any, two: Any) -> bool:
    """Equal to the last bit, tensors included."""
    (plain, tensors), (others, their_tensors) = packed(one), packed(two)
    same = tensors.keys() == their_tensors.keys()
    return bool(plain == others) and same and all(_equal(tensors[name], their_tensors[name]) for name in tensors)


def _equal(one: Tensor, two: Tensor) -> bool:
    """To the last bit; NaN is NaN."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def _close(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(torch.allclose(one.double(), two.double(), rtol=tolerance, atol=tolerance))


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
    origin = _origin()
    replies = _replies(origin)
    one, two = _round(rule, origin, list(replies)), _round(rule, origin, [*replies[5:], *replies[:5][::-1]])
    assert torch.equal(_result(rule, one), _result(rule, two)), f"{rule}: another order of replies, another model."
    assert torch.equal(one.model.buffers, two.model.buffers), f"{rule}: another order of replies, other buffers."
    assert one.weights == two.weights, f"{rule}: another order of replies, other weights."
    assert _alike(one.memory, two.memory), f"{rule}: another order of replies, another memory."


def how_a_model_is_cut_does_not_matter(rule: Rule[Any]) -> None:
    origin = _origin()
    edges = [0, 3, 3, 20, origin.parameters.numel()]
    replies = _replies(origin)
    cut = [replace(r, parts=tuple(r.parts[0][a:b] for a, b in pairwise(edges))) for r in replies]
    one, two = _round(rule, origin, replies), _round(rule, origin, cut)
    assert torch.equal(_result(rule, one), _result(rule, two)), f"{rule}: models cut into pieces give another model."


def an_empty_round_keeps_the_model(rule: Rule[Any]) -> None:
    origin = _origin()
    outcome = _round(rule, origin, [])
    if isinstance(rule, SightedRule) and rule.acts_alone:
        assert outcome.model.parameters.isfinite().all(), f"{rule}: an empty round gives a model that is not finite."
    else:
        assert outcome.model is origin, f"{rule}: a round without replies changes the model."
    assert not outcome.weights, f"{rule}: a round without replies has weights."


def a_single_site_gets_its_model(rule: Rule[Any]) -> None:
    origin = _origin()
    replies = _replies(origin, clients=1)
    outcome = _round(rule, origin, replies, known=())
    if rule.unanimous:
        expected = origin.parameters if isinstance(rule, ElectingRule) else replies[0].parts[0]
        found = outcome.model.parameters
        assert _close(found, expected), f"{rule}: a single site does not get its own model; is it unanimous?"
    assert _result(rule, outcome).isfinite().all(), f"{rule}: a single site makes a model that is not finite."


def replies_that_agree_are_the_model(rule: Rule[Any]) -> None:
    if not rule.unanimous or isinstance(rule, ElectingRule):
        return
    origin = _origin()
    same = [replace(r, parts=_replies(origin)[0].parts) for r in _replies(origin)]
    found = _round(rule, origin, list(same)).model.parameters
    assert _close(found, same[0].parts[0]), f"{rule}: all sites agree and the model is another; is it unanimous?"


def it_moves_and_scales_with_the_models(rule: Rule[Any]) -> None:
    origin = _origin(torch.float64)
    replies = _replies(origin)
    plain = _result(rule, _round(rule, origin, list(replies)))
    for declared, what, factor, offset in (
        (rule.shift_equivariant, "shift", 1.0, 0.75),
        (rule.scale_equivariant, "scale", 4.0, 0.0),
    ):
        if declared:
            moved = [replace(r, parts=(factor * r.parts[0] + offset,)) for r in replies]
            start = replace(origin, parameters=factor * origin.parameters + offset)
            found = _result(rule, _round(rule, start, moved))
            same = _close(found, factor * plain + offset, 1e-9)
            assert same, f"{rule}: it is not {what}-equivariant; declare it so."


def zero_and_huge_counts_of_examples_are_harmless(rule: Rule[Any]) -> None:
    origin = _origin()
    for examples in (0, 2**53):
        for everybody in (True, False):
            replies = [
                replace(r, report=replace(r.report, examples=examples if everybody or i == 3 else 5))
                for i, r in enumerate(_replies(origin))
            ]
            outcome = _round(rule, origin, replies)
            assert _result(rule, outcome).isfinite().all(), f"{rule}: sites with {examples} examples spoil the model."
            assert all(map(isfinite, outcome.weights.values())), f"{rule}: {examples} examples give weights of NaN."
            assert all(map(isfinite, outcome.notes.values())), f"{rule}: {examples} examples give notes of NaN."


def sites_that_stand_still_are_harmless(rule: Rule[Any]) -> None:
    origin = _origin()
    still = [replace(r, parts=(origin.parameters.clone(),)) for r in _replies(origin)]
    for replies in (still, [*still[:3], *_replies(origin)[3:]]):
        outcome = _round(rule, origin, list(replies))
        assert _result(rule, outcome).isfinite().all(), f"{rule}: sites that send the model back unchanged spoil it."


def inputs_are_left_as_they_were(rule: Rule[Any]) -> None:
    origin = _origin()
    replies = _replies(origin)
    memory = _round(rule, origin, list(replies)).memory
    plain, tensors = packed(memory)
    plain, tensors = json.loads(json.dumps(plain)), {name: tensor.clone() for name, tensor in tensors.items()}
    values = [origin.parameters, origin.buffers, *(r.parts[0] for r in replies), *(r.buffers for r in replies)]
    before = [value.clone() for value in values]
    _round(rule, origin, list(replies), memory)
    assert all(map(torch.equal, before, values)), f"{rule}: it changes the models that it is given."
    assert _alike(unpacked(rule.initial(), plain, tensors), memory), f"{rule}: it changes the memory that it is given."


def the_servers_data_are_left_as_they_were(rule: Rule[Any]) -> None:
    origin, proxy = _origin(), _proxy()
    values = [proxy.inputs, proxy.labels, *proxy.module.state_dict().values()]
    before = [value.clone() for value in values]
    modes = [module.training for module in proxy.module.modules()]
    rule.aggregate(origin, _replies(origin), rule.initial(), (), proxy)
    assert all(map(torch.equal, before, values)), f"{rule}: it changes the server's data or module."
    assert modes == [m.training for m in proxy.module.modules()], (
        f"{rule}: it leaves the server's module in another mode"
    )


def a_resumed_run_is_the_same(rule: Rule[Any]) -> None:
    """Memory survives JSON and safetensors, and the rounds after it are equal bit for bit."""
    outcomes = []
    for rests in (False, True):
        origin, memory = _origin(), rule.initial()
        for number, came in enumerate((slice(None), slice(2, 7), slice(0, 9, 2), slice(4))):
            outcome = _round(rule, origin, _replies(origin, number)[came], memory)
            origin, memory = outcome.model, outcome.memory
            if rests:
                plain, tensors = packed(memory)
                stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})
                memory = unpacked(rule.initial(), json.loads(json.dumps(plain)), load(stored))
        outcomes.append(Outcome(origin, memory))
    one, two = outcomes
    same = torch.equal(one.model.parameters, two.model.parameters) and _alike(one.memory, two.memory)
    assert same, f"{rule}: a run resumed from its stored memory is another run."


def half_precision_is_read_and_kept(rule: Rule[Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in _module().state_dict().items()}
        layout = Layout.of(state)
        origin = layout.flatten(state)
        halves = [replace(r, parts=(r.parts[0].to(dtype),)) for r in _replies(origin)]
        singles = [replace(r, parts=(r.parts[0].float(),)) for r in halves]
        one, two = _round(rule, origin, halves), _round(rule, origin, singles)
        assert torch.equal(_result(rule, one), _result(rule, two)), f"{rule}: {dtype} replies are not read exactly."
        back = layout.restore(one.model)
        kept = {name: tensor.dtype for name, tensor in back.items()} == {n: t.dtype for n, t in state.items()}
        assert kept, f"{rule}: a model of {dtype} changes its dtypes."
        assert torch.equal(back["1.num_batches_tracked"], state["1.num_batches_tracked"]), f"{rule}: integers change."


def hostile_replies_that_it_tolerates_do_not_carry_it_away(rule: Rule[Any]) -> None:
    """Whoever they are, whatever their length, in the first round and in a later one."""
    origin = _origin()
    honest = _replies(origin)
    hostile = rule.tolerates(CLIENTS)
    if not hostile:
        return
    memory = _round(rule, origin, _replies(origin, 1)).memory
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
                    (attack(i, r.parts[0]),),
                    torch.full_like(r.buffers, 1e19),
                )
                if i in rows
                else r
                for i, r in enumerate(honest)
            ]
            model = _round(rule, origin, replies, before).model
            moved = float((model.parameters.double() - origin.parameters).norm())
            who = f"{hostile} of {CLIENTS} replies, from number {first} on, {name},"
            assert moved <= limit, f"{rule}: {who} move the model by {moved:g}."
            assert float(model.buffers.abs().max()) <= 1e6, f"{rule}: {who} carry the buffers away."


def it_serves_the_privacy_that_its_kind_can(rule: Rule[Any]) -> None:
    masked = "masked" in rule.privacy_modes
    assert masked <= isinstance(rule, BlindRule), f"{rule}: it looks at models, so it cannot serve masked runs."


def flowers_own_start_gives_the_same(rule: Rule[Any]) -> None:
    results = []
    for start in (FlowerStrategy.start, Strategy.start):
        grid = LocalGrid(_drifting_app(), [f"site-{i:02d}" for i in range(CLIENTS)])
        layout = Layout.of_module(_module())
        strategy = FlowerStrategy(
            rule, fraction_evaluate=0, proxy=_proxy(), buffers=[entry.name for entry in layout.buffers]
        )
        results.append((start(strategy, grid, to_arrays(_module().state_dict()), num_rounds=2).arrays, strategy.memory))
    (one, memory), (two, other) = results
    left, right = to_state(one), to_state(two)
    same = all(torch.equal(left[name], right[name]) for name in left) and _alike(memory, other)
    assert same, f"{rule}: under Flower's own start() the result is another."


def _drifting_app() -> ClientApp:
    """Sites that add a little of their own to what they get."""
    app = ClientApp()

    @app.train()
    def _train(message: Message, context: Any) -> Message:
        site = int(context.node_config["partition-id"])
        generator = torch.Generator().manual_seed(site)
        arrays = next(record for record in message.content.values() if isinstance(record, ArrayRecord))
        rounds = next(record for record in message.content.values() if isinstance(record, ConfigRecord))
        state = {
            name: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for name, t in to_state(arrays).items()
        }
        metrics = MetricRecord({"num-examples": 3 + site, "accuracy": 0.5, "loss": float(len(rounds))})
        return Message(RecordDict({"arrays": to_arrays(state), "metrics": metrics}), reply_to=message)

    return app


CHECKS: tuple[Callable[[Rule[Any]], None], ...] = (
    it_is_a_frozen_record_of_its_settings,
    the_order_of_replies_does_not_matter,
    how_a_model_is_cut_does_not_matter,
    an_empty_round_keeps_the_model,
    a_single_site_gets_its_model,
    replies_that_agree_are_the_model,
    it_moves_and_scales_with_the_models,
    zero_and_huge_counts_of_examples_are_harmless,
    sites_that_stand_still_are_harmless,
    inputs_are_left_as_they_were,
    the_servers_data_are_left_as_they_were,
    a_resumed_run_is_the_same,
    half_precision_is_read_and_kept,
    hostile_replies_that_it_tolerates_do_not_carry_it_away,
    it_serves_the_privacy_that_its_kind_can,
    flowers_own_start_gives_the_same,
)
