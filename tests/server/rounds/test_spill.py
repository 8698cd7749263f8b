"""Models in mapped files give the same bits as models in memory, and hold little memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy
from corymb.server.rounds.spill import Spill
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import Reply
from corymb.tests.support import RULES_WITHOUT_PROXY, content

MODEL = {"a.weight": torch.zeros(40, 5), "b.weight": torch.zeros(7)}
SIGHTED = [name for name, rule in RULES_WITHOUT_PROXY.items() if rule.kind != "blind"]


def client(message: Message, context: Context) -> Message:
    sent: Any = message.content
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    state = to_state(sent["arrays"])
    return Message(
        content({n: t + torch.randn(t.shape, generator=generator) for n, t in state.items()}, 5), reply_to=message
    )


@pytest.mark.parametrize("name", SIGHTED)
@pytest.mark.parametrize("limit", [0.5, 2000.0])  # bytes: all models in files, or about half of them
def test_every_sighted_rule_gives_the_same_bits(name: str, limit: float) -> None:
    models = []
    for spill in (limit, math.inf):
        strategy = FlowerStrategy(RULES_WITHOUT_PROXY[name], fraction_evaluate=0.0, spill_bytes=spill)
        models.append(to_state(strategy.start(LocalGrid(client, 8), to_arrays(MODEL), num_rounds=2).arrays))
    assert all(torch.equal(models[0][entry], models[1][entry]) for entry in MODEL)


def test_the_files_have_no_name(tmp_path: Path) -> None:
    spill = Spill(1000, str(tmp_path))
    (small, large) = spill.watch(iter([Reply.of("a", torch.zeros(200)), Reply.of("b", torch.arange(200.0))]))
    assert torch.equal(large.vector(torch.float32), torch.arange(200.0))
    assert torch.equal(small.vector(torch.float32), torch.zeros(200))
    matrix = spill.matrix(3, 200, torch.float64)
    matrix.fill_(1.5)
    assert matrix.sum() == 900
    assert not list(tmp_path.iterdir())
