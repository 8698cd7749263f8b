from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from torch import nn

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import CandidateElection, FlowerStrategy, Journal
from corymb.server.app import app
from corymb.server.settings import ServerSettings
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAU, FedAvg, FedLAW, Krum, Layerwise, Median, Proxy
from corymb.strategies.core.registry import import_reference
from corymb.tests.support import content


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def site(message: Message, context: Context) -> Message:
    return Message(content(to_state(message.content.array_records["arrays"]), 3), reply_to=message)


def test_the_app_runs_from_a_run_config(tmp_path: Path) -> None:
    config = {
        "model": "corymb.tests.server.test_app:small",
        "rounds": 2,
        "journal": str(tmp_path / "journal"),
        "rules.name": "fedau",
        "rules.parameters.cutoff": 7,
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


def test_all_components_of_a_run_come_from_the_config(tmp_path: Path) -> None:
    """The keys are those of an experiment's tables, with lists as JSON strings."""
    betas = []

    def recording(message: Message, context: Context) -> Message:
        betas.append(message.content["config"].get("train.optimizer_options.betas"))
        return site(message, context)

    config = {
        "model": "corymb.tests.server.test_app:small",
        "proxy.data": "corymb.tests.server.test_app:server_data",
        "rounds": 2,
        "fraction-evaluate": 0.0,
        "journal": str(tmp_path / "journal"),
        "rules.name": "fedlaw",
        "rules.parameters.epochs": 2,
        "rules.train.optimizer": "Adam",
        "rules.train.optimizer_options.betas": "[0.5, 0.9]",
        "rules.server_optimizer.optimizer": "SGD",
        "rules.server_optimizer.learning_rate": 0.5,
        "rules.server_optimizer.options.momentum": 0.9,
        "rules.candidate_election": '["median", "fedavg"]',
        "round_size.kind": "share",
        "round_size.share": 0.7,
    }
    grid = LocalGrid(recording, 3, run_config=config)
    app(grid=grid, context=grid.server_context())
    journal = Journal(tmp_path / "journal")
    rounds = list(journal.rounds())
    journal.close()
    assert [len(record.admitted) for record in rounds] == [2, 2]
    assert all({"gamma", "waited-for"} <= record.notes.keys() for record in rounds)
    assert set(betas) == {"[0.5, 0.9]"}


def test_a_proxy_of_another_model_raises_an_error() -> None:
    strategy = FlowerStrategy(FedLAW(), proxy=Proxy(nn.Linear(2, 3), torch.zeros(1, 2), torch.zeros(1).long()))
    with pytest.raises(ValueError, match=r"The proxy's module is not the model: only one of them has"):
        strategy.start(LocalGrid(site, 3), to_arrays(nn.Linear(2, 2).state_dict()))


def read(**config: Any) -> ServerSettings:
    return ServerSettings.read({"model": "x:y"} | {key.replace("__", "."): value for key, value in config.items()})


def test_rules_come_from_the_config() -> None:
    assert read().rules[0].make() == FedAvg()
    assert read(rules="median").rules[0].make() == Median()
    assert read(rules__name="fedau", rules__parameters__population=9).rules[0].make() == FedAU(population=9)
    assert read(rules__0__name="fedau").rules[0].make() == FedAU()
    nested = {"rules__name": "layerwise", "rules__parameters__rule__name": "krum"}
    assert read(**nested, rules__parameters__rule__hostile=2).rules[0].make() == Layerwise(Krum(hostile=2))
    assert read(rules__name="layerwise", rules__parameters__rule="median").rules[0].make() == Layerwise(Median())
    election = read(rules__name="ida", rules__candidate_election='["krum", "median"]').rules[0].make_election()
    assert election == CandidateElection((Krum(), Median()))
    with pytest.raises(ValueError, match=r"rules = .*at most 1 item"):
        read(rules__0__name="fedau", rules__1__name="ida")


def test_errors_name_every_wrong_key() -> None:
    with pytest.raises(ValueError, match=r"model is required; rounds = 0: .*; seed = 'x': "):
        ServerSettings.read({"rounds": 0, "seed": "x"})
    for config, message in (
        ({"round": 9}, "Unknown key 'round' in the run config. Did you mean 'rounds'"),
        ({"min-available-node": 9}, "Did you mean 'min_available_nodes'"),
        ({"rules.name": "fedau", "rules.parameters.cutof": 9}, "no parameter 'cutof'. Did you mean 'cutoff'"),
        ({"rules.name": "fedau", "rules.cutoff": 9}, r"rules\.0\.cutoff is not a known key"),
        ({"train.learning_rat": 0.1}, r"train\.learning_rat is not a known key \(did you mean 'learning_rate'\?\)"),
        ({"rules.name": "ida", "rules.server_optimizer.lr": 1.0}, r"rules\.0\.server_optimizer\.lr is not a known key"),
        (
            {"round_size.kind": "share", "round_size.window": 3},
            r"round_size\.window is a key of kind = 'backup_w",
        ),
        ({"rules": "ida", "rules.label": "x"}, "as a value and as a table|'rules' is a value"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerSettings.read({"model": "x:y", **config})
    with pytest.raises(ValueError, match="'nowhere:make' cannot be imported"):
        import_reference("nowhere:make", "model")


def test_unknown_keys_are_ignored_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr.corymb"):
        assert read(hospital="basel").model.kind == "x:y"
    assert "ignores these keys of the run config: hospital" in caplog.text
