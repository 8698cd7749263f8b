from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from torch import nn

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Guard, Journal
from corymb.server.app import ServerSettings, app, function, guard_from, rule_from, step_from
from corymb.simulations.grid import LocalGrid
from corymb.strategies import FedAU, FedAvg, FedLAW, Krum, Layerwise, Median, Proxy, Step
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


def server_data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def test_data_step_guard_and_patience_come_from_the_config(tmp_path: Path) -> None:
    config = {
        "model": "corymb.tests.server.test_app:small",
        "proxy": "corymb.tests.server.test_app:server_data",
        "num-server-rounds": 2,
        "fraction-evaluate": 0.0,
        "journal": str(tmp_path / "journal"),
        "rule.name": "fedlaw",
        "rule.epochs": 2,
        "step.optimizer": "SGD",
        "step.learning_rate": 0.5,
        "step.options.momentum": 0.9,
        "guard": "median, fedavg",
        "wait-share": 0.7,
    }
    grid = LocalGrid(site, 3, run_config=config)
    app(grid=grid, context=grid.server_context())
    journal = Journal(tmp_path / "journal")
    rounds = list(journal.rounds())
    journal.close()
    assert [len(record.admitted) for record in rounds] == [2, 2]
    assert all("gamma" in record.rule for record in rounds)


def test_rules_within_rules_come_from_the_config() -> None:
    nested = {"rule.name": "layerwise", "rule.rule.name": "krum", "rule.rule.hostile": 2}
    assert rule_from(nested) == Layerwise(Krum(hostile=2))
    assert rule_from({"rule.name": "layerwise", "rule.rule": "median"}) == Layerwise(Median())
    with pytest.raises(ValueError, match=r"has a key that 'rule\.rule\.hostile' lies within"):
        rule_from({"rule.name": "layerwise", "rule.rule": "krum", "rule.rule.hostile": 2})
    assert step_from({"step.optimizer": "Adam"}) == Step("Adam")
    assert step_from({"model": "x"}) is None
    with pytest.raises(ValueError, match=r"'step\.lr'; there are optimizer, learning_rate, options"):
        step_from({"step.lr": 1.0})
    assert guard_from("") == Guard()
    assert guard_from("krum,median") == Guard((Krum(), Median()))


def test_a_proxy_of_another_model_is_refused() -> None:
    strategy = FlowerStrategy(FedLAW(), proxy=Proxy(nn.Linear(2, 3), torch.zeros(1, 2), torch.zeros(1).long()))
    with pytest.raises(ValueError, match=r"The proxy's module is not the model: .* is in one only"):
        strategy.start(LocalGrid(site, 3), to_arrays(nn.Linear(2, 2).state_dict()))


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
        function("model", "nowhere:make")
