"""Rules with proxy data against replies that are finite but so large that their outputs overflow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from corymb.server import FlowerStrategy
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import (
    RULES,
    FedLAW,
    Layout,
    Outcome,
    Proxy,
    Reply,
    Rule,
    RunOffDistillation,
    ServerOptimizer,
    make_rule,
)  # fmt: skip
from corymb.strategies.merging.fisher import fisher_mean
from corymb.strategies.merging.isotropic import ranks
from corymb.tests.support import with_parts

PROXY_RULES = [name for name, kind in RULES.items() if kind.needs_proxy]


def outcome(rule: Rule[Any], hostile: int, examples: int = 60, norm: bool = False) -> Outcome[Any]:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm1d(5)] if norm else []
    module = nn.Sequential(nn.Linear(4, 5), *middle, nn.ReLU(), nn.Linear(5, 3))
    layout = Layout.of_module(module)
    origin = layout.flatten(module.state_dict())
    proxy = Proxy(module, torch.randn(examples, 4), torch.arange(examples) % 3)
    replies = [
        Reply.of(f"site-{i}", origin.parameters + 0.1 * torch.randn(layout.num_parameters), 1 + i) for i in range(7)
    ]
    replies = [replace(r, buffers=origin.buffers.clone()) for r in replies]
    if hostile >= 0:
        huge = 1e20 * torch.randn(layout.num_parameters)
        replies[hostile] = with_parts(replies[hostile], huge)
    return rule.aggregate(origin, replies, rule.initial(), proxy=proxy)


@pytest.mark.parametrize("name", PROXY_RULES)
@pytest.mark.parametrize("hostile", [0, 3, 6])
def test_a_model_whose_outputs_overflow_is_dropped(name: str, hostile: int) -> None:
    found = outcome(make_rule(name), hostile)
    assert found.model.parameters.abs().max() < 100
    if name != "run_off_distillation":  # which keeps the model as a voter
        assert found.notes["dropped"] == 1
        assert f"site-{hostile}" not in found.weights


@pytest.mark.parametrize("name", PROXY_RULES)
@pytest.mark.parametrize("examples", [33, 1025])
def test_a_last_batch_of_one_does_no_harm(name: str, examples: int) -> None:
    parameters = {} if name in ("fisher", "greedy_soup", "weight_matching") else {"batch_size": 32, "epochs": 1}
    assert outcome(make_rule(name, **parameters), -1, examples, norm=True).model.parameters.isfinite().all()


def test_a_model_with_zero_fisher_does_not_take_all_of_the_weight() -> None:
    models = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    merged = fisher_mean(models, torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([0.5, 0.5]))
    assert (merged < 4).all()


def test_a_failed_round_does_not_change_the_momentum() -> None:
    """A client that makes one round fail must not change the momentum of the server optimiser."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message

    from corymb.protocol.codec import to_arrays, to_state
    from corymb.protocol.records import of_kind
    from corymb.tests.support import content

    def site(message: Message, context: Context) -> Message:
        state = to_state(of_kind(message.content, ArrayRecord)[0])
        breaks = of_kind(message.content, ConfigRecord)[0]["server-round"] == 2
        return Message(content({"w": state["w"] + (6e4 if breaks else 0.5)}, 1), reply_to=message)

    models = []
    strategy = FlowerStrategy(
        make_rule("fedavg"),
        server_optimizer=ServerOptimizer("SGD", 2.0, {"momentum": 0.5}),
        fraction_evaluate=0,
        on_round=lambda record: models.append(strategy.state.model.parameters.clone()),
    )
    strategy.start(LocalGrid(site, 3), to_arrays({"w": torch.zeros(2).half()}), num_rounds=4)
    steps = [float((b - a).abs().max()) for a, b in pairwise(models)]
    assert steps[0] == 0  # the result overflows float16, so the round keeps the old model
    assert all(0 < step < 10 for step in steps[1:])


def test_models_whose_outputs_overflow_still_vote() -> None:
    assert outcome(RunOffDistillation(epochs=1), 2).model.parameters.isfinite().all()


def test_the_ranks_add_up_to_the_rank_of_the_matrix() -> None:
    for rank in range(1, 12):
        for tasks in range(1, 20):
            for common in (0.0, 0.1, 0.5, 1.0):
                kept, own = ranks(rank, tasks, common)
                assert kept >= 0
                assert own >= 0
                assert kept + own * tasks == rank


def test_a_proxy_with_shared_parameters_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    with pytest.raises(ValueError, match=r"shares the parameter '1.weight' between layers"):
        Proxy(module, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="epochs is 13; use at least 14"):
        FedLAW(average=True, epochs=13)
