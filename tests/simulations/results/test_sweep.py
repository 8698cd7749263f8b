"""Sweeps over lists of values, and over ranges with Optuna."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from corymb.simulations.results.commands import summary_of
from corymb.simulations.results.score import Score
from corymb.simulations.results.sweep import Tried, best_settings, parse_grid, sweep
from corymb.simulations.results.tuning import Range, has_range, parse_space, tune

CONSOLE = Console(quiet=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "exp.toml"
    path.write_text('rounds = 2\nrules = ["fedavg", "fedau"]\n[partition]\nclients = 5\n')
    return path


def test_a_sweep_chooses_on_the_validation_part(file: Path, tmp_path: Path) -> None:
    grid = parse_grid(["train.learning_rate=0.001,0.5", "rules.cutoff=2,50"])
    assert grid == {"train.learning_rate": [0.001, 0.5], "rules.cutoff": [2, 50]}
    tried = sweep(file, grid, tmp_path / "out", 1, CONSOLE)
    assert [each.setting for each in tried if each.rule == "fedavg"] == [  # which has no cutoff, so it runs once
        {"train.learning_rate": 0.001}, {"train.learning_rate": 0.5}
    ]  # fmt: skip
    assert len(tried) == 6
    best = max((each for each in tried if each.rule == "fedau"), key=lambda each: each.validation)
    assert best.setting["train.learning_rate"] == 0.5
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) == 7
    lines = summary_of([tmp_path / "out"], "csv").splitlines()
    assert lines[0].startswith("experiment,rule,accuracy,")
    assert len(lines) == 7
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert sweep(file, grid, tmp_path / "out", 1, CONSOLE) == tried  # nothing is run again
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}


def test_mistakes_are_found_before_anything_runs(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No rule of the experiment has the parameter 'cutof'"):
        sweep(file, {"rules.cutof": [1]}, tmp_path / "out", 1, CONSOLE)
    with pytest.raises(ValueError, match="is no list of values"):
        parse_grid(["train.learning_rate"])
    with pytest.raises(ValueError, match="learning_rate"):
        sweep(file, {"train.learning_rate": [0.1, -1]}, tmp_path / "out", 1, CONSOLE)
    assert not (tmp_path / "out").exists()


def test_personal_rules_are_chosen_on_validation_parts_of_the_clients(tmp_path: Path) -> None:
    file = tmp_path / "exp.toml"
    file.write_text(
        'rounds = 2\nrules = ["local", "ditto", "fedavg"]\n[partition]\nclients = 4\n[evaluate]\nclients = true\n'
    )
    tried = sweep(file, {"rules.pull": [0.0, 1.0]}, tmp_path / "out", 1, CONSOLE)
    assert [(each.rule, each.setting) for each in tried] == [
        ("local", {}), ("ditto", {"rules.pull": 0.0}), ("fedavg", {}), ("ditto", {"rules.pull": 1.0})
    ]  # fmt: skip
    by_rule = {(each.rule, *each.setting.values()): each for each in tried}
    assert by_rule["local",].validation == by_rule["ditto", 0.0].validation  # Ditto without a pull is local training
    assert by_rule["local",].validation != by_rule["local",].test


def test_a_range_is_read() -> None:
    assert parse_space(["train.learning_rate=1e-3..0.5", "train.epochs=1..4", "rules.cutoff=2,50"]) == {
        "train.learning_rate": Range(0.001, 0.5), "train.epochs": Range(1, 4), "rules.cutoff": [2, 50]
    }  # fmt: skip
    assert not has_range(["data.source=../data,x.y"])
    with pytest.raises(ValueError, match="is empty"):
        parse_space(["train.epochs=4..1"])


def test_optuna_finds_a_learning_rate_and_goes_on(file: Path, tmp_path: Path) -> None:
    space = parse_space(["train.learning_rate=0.0001..1", "rules.cutoff=2,50"])
    tried = tune(file, space, tmp_path / "out", 4, CONSOLE)
    assert {each.rule for each in tried} == {"fedavg", "fedau"}
    assert all(0.0001 <= each.setting["train.learning_rate"] <= 1 for each in tried)
    assert {tuple(each.setting) for each in tried if each.rule == "fedavg"} == {("train.learning_rate",)}
    validation = [each.validation for each in tried]
    assert max(validation) > min(validation) + 0.2
    assert tune(file, space, tmp_path / "out", 4, CONSOLE) == tried  # four trials are there already
    assert len(tune(file, space, tmp_path / "out", 5, CONSOLE)) > len(tried)


def test_what_will_not_win_is_stopped(tmp_path: Path) -> None:
    file = tmp_path / "exp.toml"
    file.write_text('rounds = 8\nrules = ["fedavg"]\n[partition]\nclients = 3\n[data]\nexamples = 600\n')
    tried = tune(file, {"train.learning_rate": Range(0.003, 1.0)}, tmp_path / "out", 10, CONSOLE)
    assert 5 <= len(tried) < 10
    assert len(list((tmp_path / "out").glob("fedavg-*/summary.json"))) == len(tried)


def test_what_rules_meet_is_a_condition_and_no_choice() -> None:
    tried = [
        Tried("fedavg", {"attack.clients": 0, "train.learning_rate": 9.0}, float("nan"), float("nan")),  # diverged
        Tried("fedavg", {"attack.clients": 0, "train.learning_rate": 0.1}, 0.8, 0.7),
        Tried("fedavg", {"attack.clients": 0, "train.learning_rate": 0.5}, 0.9, 0.8),
        Tried("fedavg", {"attack.clients": 2, "train.learning_rate": 0.1}, 0.5, 0.4),
        Tried("median", {"attack.clients": 2, "train.learning_rate": 0.1}, 0.6, 0.5),
    ]
    score = Score("accuracy", "accuracy")
    text = Console(width=200, file=StringIO())
    text.print(best_settings(tried, score))
    lines = [" ".join(line.split()) for line in text.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [
        "condition rule best setting validation accuracy test accuracy",
        "attack.clients = 0 fedavg train.learning_rate = 0.5 90.00 80.00",
        "attack.clients = 2 median train.learning_rate = 0.1 60.00 50.00",
        "attack.clients = 2 fedavg train.learning_rate = 0.1 50.00 40.00",
    ]
