"""An experiment in a federation: the same TOML, and each site's own data."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from corymb.server import NoReplyAdmitted
from corymb.simulations.experiments.federated import KEY, client, runs_of, serve, settings_in, unused
from corymb.simulations.experiments.reader import read
from corymb.simulations.grid.local_grid import LocalGrid

TOML = """
rounds = 3
rules = ["fedavg", { name = "krum", parameters = { hostile = 0 }, train = { steps = 3 } }]
seeds = 2
data = { source = "all.csv", label = "ill" }
model = { kind = "mlp", options = { hidden = 4 } }
train = { epochs = 2, batch_size = 8, learning_rate = 0.2 }
"""


def write_table(path: Path, seed: int, classes: int = 2, columns: int = 3) -> None:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(90, columns))
    labels = (inputs[:, 0] > 0).astype(int) + (classes - 2)
    lines = [",".join([*(f"x{column}" for column in range(columns)), "ill"])]
    lines += [
        ",".join([*(f"{value:.4f}" for value in row), str(label)]) for row, label in zip(inputs, labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The settings of each run, by title. The tables of three sites lie beside the file."""
    for number in range(3):
        write_table(tmp_path / f"{number}.csv", number)
    write_table(tmp_path / "all.csv", 9)
    (tmp_path / "exp.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORYMB_HOME", str(tmp_path))
    return dict(runs_of(read(Path("exp.toml")), sites=3))


def run(text: str, folder: Path) -> Path:
    """Run an experiment whose sites read 0.csv, 1.csv and 2.csv. Returns the folder of its journal."""
    config = {KEY: text}
    grid = LocalGrid(client, 3, run_config=config, node_config=lambda node: {"data": str(folder / f"{node}.csv")})
    serve(grid, Context(1, 0, {}, RecordDict(), config))  # type: ignore[arg-type]
    return next((folder / "runs").iterdir())


def test_each_rule_and_seed_is_a_run(settings: dict[str, str]) -> None:
    assert list(settings) == ["fedavg, seed 0", "fedavg, seed 1", "krum, seed 0", "krum, seed 1"]
    krum = settings_in(settings["krum, seed 1"])
    assert krum["model"] == {"kind": "mlp", "shape": [3], "classes": 2, "options": {"hidden": 4}}
    config = krum["config"]
    assert (config["rules.name"], config["rules.parameters.hostile"], config["rules.train.steps"]) == ("krum", 0, 3)
    assert (config["rules.train.seed"], config["rounds"], config["min_available_nodes"]) == (1, 3, 3)
    assert "rules.train.epochs" not in config


def test_sites_train_on_their_own_tables(settings: dict[str, str], tmp_path: Path) -> None:
    journal = run(settings["fedavg, seed 0"], tmp_path)
    with sqlite3.connect(journal / "journal.sqlite") as database:
        rows = database.execute("SELECT evaluate FROM rounds ORDER BY round").fetchall()
    assert json.loads(rows[-1][0])["accuracy"] > 0.85


def test_a_site_whose_data_are_read_otherwise_takes_no_part(settings: dict[str, str], tmp_path: Path) -> None:
    write_table(tmp_path / "1.csv", 1, classes=3)  # labels 1 and 2, which would become 0 and 1
    write_table(tmp_path / "2.csv", 2, columns=4)
    journal = run(settings["fedavg, seed 0"], tmp_path)
    with sqlite3.connect(journal / "journal.sqlite") as database:
        reasons = [reason for (reason,) in database.execute("SELECT reason FROM verdicts WHERE round = 1")]
    assert sum("Labels became class numbers: 1 -> 0, 2 -> 1." in reason for reason in reasons) == 1
    assert sum("an input at this site has the shape [4], and [3] in the experiment" in r for r in reasons) == 1


def test_a_run_in_which_no_site_has_data_fails(settings: dict[str, str], tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.csv").unlink()
    with pytest.raises(NoReplyAdmitted, match="There is no data at"):
        run(settings["fedavg, seed 0"], tmp_path)


def test_a_rule_with_proxy_data_is_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    Path("exp.toml").write_text(TOML.replace('"fedavg"', '"fedlaw"') + "proxy = { examples = 4 }\n")
    with pytest.raises(ValueError, match="'fedlaw' needs proxy data, which an experiment in a federation has not"):
        list(runs_of(read(Path("exp.toml")), sites=3))


def test_settings_that_a_federation_does_not_use_are_named(settings: dict[str, str], tmp_path: Path) -> None:
    assert unused(read(Path("exp.toml"))) == []
    more = (
        'partition = { kind = "iid", clients = 4 }\nattack = { kind = "sign_flip", clients = 1 }\n'
        "evaluate = { every = 5, drift = true }\n"
    )
    (tmp_path / "more.toml").write_text(TOML.replace('label = "ill"', 'label = "ill", site = "x0"') + more)
    assert unused(read(Path("more.toml"))) == ["partition", "attack", "evaluate.every", "data.site"]
