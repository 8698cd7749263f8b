"""A small model, replies to it and proxy data, on which rules are checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from corymb.strategies import Layout, Model, Outcome, Proxy, Reply, Report, Rule, VotingRule
from corymb.strategies.core.rows import SingleRow
from corymb.strategies.core.serialization import pack_memory

CLIENTS = 11  # Bulyan needs 4 f + 3 clients to tolerate f = 2 hostile ones


def make_module() -> nn.Module:
    """Return a small classifier of 4 inputs and 3 classes, with BatchNorm; always with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def make_proxy(dtype: torch.dtype = torch.float32) -> Proxy:
    """Return 48 random examples with the module of `make_module`."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 4, generator=generator, dtype=torch.float64).to(dtype)
    return Proxy(make_module().to(dtype), inputs, torch.arange(48) % 3)


def first_model(dtype: torch.dtype = torch.float32) -> Model:
    """Return the flat model of `make_module`."""
    module = make_module().to(dtype)
    return Layout.of_module(module).flatten(module.state_dict())


def replies_to(origin: Model, seed: int = 0, clients: int = CLIENTS) -> list[Reply]:
    """Return the replies of "site-00", "site-01", ...: a common update plus noise."""
    generator = torch.Generator().manual_seed(seed)
    size = origin.parameters.numel()
    common = torch.randn(size, generator=generator)
    noise = 0.5 * torch.randn(clients, size, generator=generator)
    buffers = torch.rand(clients, origin.buffers.numel(), generator=generator)
    return [
        Reply(
            Report(f"site-{i:02d}", 1 + 7 * i, {"loss": 2.0 - i / 10, "accuracy": 0.3 + i / 20, "steps": 3.0 + i}),
            SingleRow(((origin.parameters + 0.1 * (common + noise[i])).to(origin.parameters.dtype),)),
            0,
            buffers[i].to(origin.buffers.dtype),
        )
        for i in range(clients)
    ]


def with_parts(reply: Reply, *parts: Tensor) -> Reply:
    """Return `reply` with the model that consists of the flat `parts`."""
    return replace(reply, rows=SingleRow(parts), row=0)


def one_round(rule: Rule[Any], origin: Model, replies: list[Reply], memory: Any = None, **options: Any) -> Outcome[Any]:
    """Aggregate one round with proxy data; `known` are all clients, unless given in `options`."""
    known = [f"site-{i:02d}" for i in range(CLIENTS)]
    proxy = make_proxy(origin.parameters.dtype)
    memory = rule.initial() if memory is None else memory
    replies = [with_needed_metrics(reply, rule) for reply in replies]
    return rule.aggregate(origin, replies, memory, options.get("known", known), proxy)


def with_needed_metrics(reply: Reply, rule: Rule[Any]) -> Reply:
    """Return `reply` with the metrics without which the door rejects it."""
    needed = {name: abs(reply.report.metrics.get("steps", 1.0)) for name in rule.needs_metrics}
    return replace(reply, report=replace(reply.report, metrics={**needed, **reply.report.metrics}))


def learnt_vector(rule: Rule[Any], outcome: Outcome[Any]) -> Tensor:
    """Return the parameters after a round as one vector: the next model, or the models of all voters."""
    if isinstance(rule, VotingRule) and outcome.memory.models is not None:
        models: Tensor = outcome.memory.models
        return models.reshape(-1)
    return outcome.model.parameters


def equal_memories(one: Any, two: Any) -> bool:
    """Return whether two memories are bitwise equal."""
    (plain_one, tensors_one), (plain_two, tensors_two) = pack_memory(one), pack_memory(two)
    same = tensors_one.keys() == tensors_two.keys()
    return (
        bool(plain_one == plain_two)
        and same
        and all(equal(tensors_one[name], tensors_two[name]) for name in tensors_one)
    )


def equal(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors are equal in shape, dtype and every value; NaN equals NaN."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def close(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether two tensors are equal within a relative or absolute `tolerance`."""
    return bool(torch.allclose(one.double(), two.double(), rtol=tolerance, atol=tolerance))
