from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message
from torch import nn

from corymb.protocol.codec import to_state
from corymb.server import Journal
from corymb.server.app import ServerSettings, app, model_factory, rule_from
from corymb.simulations.grid import LocalGrid
from corymb.strategies import FedAU, FedAvg
from corymb.tests.support import content


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def site(message: Message, context: Context) -> Message:
    return Message(content(to_state(message.content.array_records["arrays"]), 3), reply_to=message)


def test_it_runs_from_a_run_config(tmp_path: Path) -> None:
    config = {
        "model": "corymb.tests.server.test_app:small",
        "num-server-rounds": 2,
        "journal": str(tmp_path / "journal"),
        "rule.name": "fedau",
        "rule.cutoff": 7,
        "train.epochs": 1,
    }
    grid = LocalGrid(site, 3, run_config=config)
    app(grid=grid, context=grid.server_context())
    journal = Journal(tmp_path / "journal")
    assert [len(record.admitted) for record in journal.rounds()] == [3, 3]
    assert journal.model().keys() == small().state_dict().keys()
    journal.close()


def test_rules_come_from_the_config() -> None:
    assert rule_from({}) == FedAvg()
    assert rule_from({"rule.name": "fedau", "rule.population": 9, "model": "x:y"}) == FedAU(population=9)
    with pytest.raises(ValueError, match="no parameter 'cutof'"):
        rule_from({"rule.name": "fedau", "rule.cutof": 9})


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"model: .*; num-server-rounds: .*; seed: "):
        ServerSettings.read({"num-server-rounds": 0, "seed": "x"})
    with pytest.raises(ValueError, match="'num-server-round'; did you mean 'num-server-rounds'"):
        ServerSettings.read({"model": "x:y", "num-server-round": 9})
    with pytest.raises(ValueError, match="'nowhere:make' cannot be imported"):
        model_factory("nowhere:make")
