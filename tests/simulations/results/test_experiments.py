from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from corymb import cli_research
from corymb.cli import main
from corymb.server.journal.files import sha256
from corymb.simulations.data.partition_settings import DirichletSettings
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import SHIPPED, parse_change, read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.folder import collect, prepare, write
from corymb.simulations.results.plots import _smooth
from corymb.simulations.results.report import write_report
from corymb.simulations.results.runner import run_all
from corymb.simulations.results.summary import scores
from corymb.tests.support import run_rule, scenario_of_seed

SMALL: dict[str, Any] = {
    "name": "small",
    "rounds": 4,
    "rules": ["fedavg", "median", {"name": "fedau", "label": "FedAU / 3", "parameters": {"cutoff": 3}}],
    "seeds": 2,
    "partition": {"clients": 6},
    "participation": {"kind": "bernoulli", "probability": 0.6},
    "train": {"steps": 2},
    "evaluate": {"every": 2, "last": 3},
}


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.toml"
    path.write_text(text)
    return path


BASE = 'rounds = 2\nrules = ["fedavg"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'rounds = 2\nrules = ["fedavgg"]',
            r"rules\.0: Unknown rule 'fedavgg'\. Did you mean 'fedavg'\? Known names: apfl, bulyan",
        ),
        (
            'rounds = 2\n[[rules]]\nname = "fedau"\nparameters = { cutof = 3 }',
            r"Rule 'fedau' has no parameter 'cutof'\. Did you mean 'cutoff'",
        ),
        (
            'rounds = 2\n[[rules]]\nname = "fedau"\ntrain = { step = 3 }',
            r"rules\.0\.train\.step is not a known key \(did you mean 'steps'",
        ),
        (BASE + "roundz = 3", r"roundz is not a known key \(did you mean 'rounds'\?\)"),
        (BASE + "[partition]\nalfa = 3", r"partition\.alfa is not a known key \(did you mean 'alpha'\?\)"),
        (BASE + "[partition]\nalpha = 0", r"partition\.alpha = 0: input should be greater than 0"),
        (BASE + "[participation]\nkind = 'trace'", r"participation\.path is required"),
        (BASE + "[train]\nepochs = 1\nsteps = 1", "set only one of them"),
        ("rounds = 0", r"rounds = 0: .*; rules is required"),
        ("rounds = ", "not valid TOML"),
        ('rounds = 2\nrules = ["ida", "ida"]', "two rules have the label"),
        (BASE + "seeds = []", "seeds"),
        (BASE + "seeds = [1, 1]", "different whole numbers"),
        (
            'rounds = 2\nrules = [{name = "ida", label = "a b"}, {name = "ida", label = "a-b"}]',
            "two rules have the label",
        ),
        (BASE + 'name = "../up"', "name"),
    ],
)
def test_invalid_experiments_are_errors_that_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.IGNORECASE)) as caught:
        read(toml(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_changes_and_names(tmp_path: Path) -> None:
    changes = dict(map(parse_change, ["partition.alpha=0.5", "data.source=some/path", "seeds=3", "train.steps = 7"]))
    experiment = read(toml(tmp_path, BASE), {key.strip(): value for key, value in changes.items()})
    assert (experiment.name, experiment.seeds) == ("experiment", [0, 1, 2])
    assert experiment.partition == DirichletSettings(alpha=0.5)
    assert experiment.data.source == "some/path"
    with pytest.raises(ValueError, match="is not KEY=VALUE"):
        parse_change("alpha")
    with pytest.raises(ValueError, match="no experiment 'nowhere'; give a TOML file or one of: async, bytes, demo, di"):
        read(Path("nowhere"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path: Path) -> None:
    assert read(path).name == path.stem


def test_data_model_and_device_are_checked_before_any_run() -> None:
    for changes, message in (
        (
            {"partition": {"clients": 2000}},
            "partition.clients = 2000 needs at least 2000 examples, and there are 1438",
        ),
        ({"partition": {"kind": "site"}}, "have no sites"),
        ({"data": {"source": "nowhere"}}, "no data at 'nowhere'"),
        ({"model": {"kind": "nothing"}}, "Unknown model 'nothing'"),
        ({"model": {"kind": "mlp", "options": {"hidden": -1}}}, "'mlp' cannot be made"),
        ({"model": {"kind": "torch.nn:Identity"}}, "cannot be made|does not fit"),
        ({"train": {"device": "warp"}}, "'warp' is not available"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(Experiment(**{**SMALL, **changes}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    experiment = Experiment(**SMALL)
    resolved = resolve(experiment)
    prepare(experiment, folder, resume=False)
    (runs,) = run_all([(resolved, folder)], Console(quiet=True))
    assert runs == collect(experiment, folder)
    write(experiment, runs, folder)
    write_report(resolved, runs, folder)
    return folder


def test_result_files(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [(run["rule"], run["seed"]) for run in summary["runs"]] == [
        (rule, seed) for rule in ("fedavg", "median", "FedAU / 3") for seed in (0, 1)
    ]
    for run_ in summary["runs"]:
        assert run_.keys() == {"rule", "seed", "rounds", "final_accuracy", "wall_seconds", "model_sha256"}
        assert 0 < run_["final_accuracy"] < 1
    best = max(summary["runs"], key=lambda run_: run_["final_accuracy"])
    assert sha256(finished / "model.safetensors") == best["model_sha256"]
    assert load_file(finished / "model.safetensors").keys() == {"1.weight", "1.bias"}
    again = Experiment(**tomllib.loads((finished / "config.toml").read_text()))
    assert again == Experiment(**SMALL)


def test_rounds_and_clients_files_are_consistent(finished: Path) -> None:
    rounds = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    clients = [json.loads(line) for line in (finished / "clients.jsonl").read_text().splitlines()]
    assert len(rounds) == 3 * 2 * 4
    assert all(sum(row["replies"].values()) == 6 for row in rounds)
    assert sum(row["replies"].get("admitted", 0) for row in rounds) == len(clients)
    assert all(("server" in row) == (row["round"] % 2 == 0) for row in rounds)
    for row in rounds:
        of_round = [c for c in clients if all(c[k] == row[k] for k in ("rule", "seed", "round"))]
        if row["rule"] == "fedavg" and of_round:
            assert sum(c["weight"] for c in of_round) == pytest.approx(1)
        if row["rule"] == "median":
            assert all("weight" not in c for c in of_round)


def test_all_rules_have_the_same_participation(finished: Path) -> None:
    clients = [json.loads(line) for line in (finished / "clients.jsonl").read_text().splitlines()]
    participants = {
        rule: {(c["seed"], c["round"], c["node"]) for c in clients if c["rule"] == rule}
        for rule in ("fedavg", "median", "FedAU / 3")
    }
    assert participants["fedavg"] == participants["median"] == participants["FedAU / 3"]


def test_the_report_is_one_self_contained_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.split("base64")[0]
    assert page.count("data:image/png;base64,") == 4
    assert "FedAU / 3" in page
    for name in ("accuracy", "participation", "weights", "labels"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_scores() -> None:
    class Fake:
        def __init__(self, rule: str, final: float) -> None:
            self.rule, self.final = rule, final

    runs: Any = [Fake("a", 0.5), Fake("a", 0.7), Fake("b", 0.9)]
    assert scores(runs)["a"] == pytest.approx((0.6, 0.1414), abs=1e-4)
    assert scores(runs)["b"] == pytest.approx((0.9, math.nan), nan_ok=True)


def test_smoothing_keeps_length_and_constant_values() -> None:
    for points in (1, 49, 100, 151, 2000):
        smooth = _smooth(np.full(points, 3.0))
        assert len(smooth) == points
        assert smooth == pytest.approx(3.0)


@pytest.mark.parametrize("forked", [True, False])
def test_the_same_seed_gives_the_same_model_in_another_process(
    tmp_path: Path, finished: Path, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corymb.simulations.results.runner.can_fork", lambda: forked)
    experiment = Experiment(**SMALL)
    (runs,) = run_all([(resolve(experiment), tmp_path)], Console(quiet=True), jobs=2)
    assert runs == collect(experiment, tmp_path)
    assert [run.model_sha256 for run in runs] == [
        run["model_sha256"] for run in json.loads((finished / "summary.json").read_text())["runs"]
    ]


def test_the_same_seed_gives_the_same_model_with_replies_shuffled(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corymb.tests.server.test_strategy import Shuffled

    monkeypatch.setattr("corymb.server.rounds.pulls.POLL_SECONDS", 0)
    monkeypatch.setattr("corymb.simulations.results.run.LocalGrid", Shuffled)
    experiment = Experiment(**SMALL)
    (runs,) = run_all([(resolve(experiment), tmp_path)], Console(quiet=True))
    assert [run.model_sha256 for run in runs] == [
        run["model_sha256"] for run in json.loads((finished / "summary.json").read_text())["runs"]
    ]


def test_another_seed_gives_another_model(finished: Path) -> None:
    runs = json.loads((finished / "summary.json").read_text())["runs"]
    assert len({run_["model_sha256"] for run_ in runs}) == len(runs)


def test_results_do_not_overwrite_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(ValueError, match=r"contains thesis\.docx, which is not a result"):
        prepare(Experiment(**SMALL), tmp_path, resume=False)
    assert (tmp_path / "thesis.docx").exists()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "labels.png").write_text("not a plot of Corymb")
    with pytest.raises(ValueError, match="is not a result"):
        prepare(Experiment(**SMALL), pictures, resume=False)
    with pytest.raises(ValueError, match="There is a file at"):
        prepare(Experiment(**SMALL), tmp_path / "thesis.docx", resume=False)


def test_an_invalid_setting_keeps_earlier_results(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo" / "journals").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "summary.json").write_text("{}")
    assert corymb("simulate", "--set", "data.source=nowhere", cwd=tmp_path).returncode == 2
    assert (tmp_path / "runs" / "demo" / "summary.json").exists()


def test_several_experiments_run_in_parallel(tmp_path: Path) -> None:
    small = ["rounds = 2", "seeds = 1", 'rules = ["fedavg"]', "train.steps = 1", "evaluate.every = 2"]
    small.append('based_on = "demo"')
    for name, kind in (("often", "always"), ("in_turn", "cyclic")):
        (tmp_path / f"{name}.toml").write_text("\n".join([*small, f'participation.kind = "{kind}"']))
    result = corymb("simulate", "often.toml", "in_turn.toml", "--jobs", "2", "--out", "both", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    admitted = []
    for name in ("often", "in_turn"):
        rounds = (tmp_path / "both" / name / "rounds.jsonl").read_text().splitlines()
        admitted.append(sum(json.loads(line)["replies"]["admitted"] for line in rounds))
        assert (tmp_path / "both" / name / "report.html").exists()
        assert f"\n{name}\n" in result.stdout
    assert admitted[0] > admitted[1]
    (tmp_path / "both" / "in_turn" / "thesis.docx").write_text("mine")
    refused = corymb("simulate", "often.toml", "in_turn.toml", "--out", "both", cwd=tmp_path)
    assert "contains thesis.docx" in refused.stderr
    assert (tmp_path / "both" / "often" / "report.html").exists()
    assert "share a folder" in corymb("simulate", "often.toml", "often.toml", cwd=tmp_path).stderr


HARMFUL = """
import multiprocessing, os, time
from torch import nn


class Harmful(nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(64, classes)

    def forward(self, inputs):
        if self.training and multiprocessing.parent_process():
            {harm}
        return super().forward(inputs.flatten(1))
"""


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("raise RuntimeError('out of order')", "Every client failed"),
        ("time.sleep(3) or os._exit(1)", "possibly because memory ran out"),
    ],
)
def test_a_failed_run_stops_the_others_and_keeps_finished_results(tmp_path: Path, harm: str, message: str) -> None:
    (tmp_path / "harmful.py").write_text(HARMFUL.format(harm=harm))
    small = ['rules = ["fedavg"]', "seeds = 1", 'based_on = "demo"', 'participation.kind = "always"']
    (tmp_path / "good.toml").write_text("\n".join(["rounds = 1", *small]))
    (tmp_path / "bad.toml").write_text("\n".join(["rounds = 1000000", 'model.kind = "harmful:Harmful"', *small]))
    command = ["simulate", "good.toml", "bad.toml", "--jobs", "2", "--out", "both", "--set", "engine=serial"]
    result = corymb(*command, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert (tmp_path / "both" / "good" / "report.html").exists()
    assert not (tmp_path / "both" / "bad" / "summary.json").exists()


def test_a_run_whose_clients_all_fail_is_an_error(tmp_path: Path) -> None:
    module = """
from torch import nn


class Broken(nn.Linear):
    def __init__(self, shape, classes):
        super().__init__(64, classes)

    def forward(self, inputs):
        if self.training:
            raise RuntimeError("out of order")
        return super().forward(inputs.flatten(1))
"""
    (tmp_path / "broken.py").write_text(module)
    changes = ["rounds=3", "model.kind=broken:Broken", "participation.kind=always", "evaluate.every=3"]
    result = corymb("simulate", *(f"--set={change}" for change in changes), cwd=tmp_path)
    assert result.returncode == 2
    assert "Every client failed" in result.stderr
    assert result.stderr.count("Traceback") == 1


def test_one_client_per_table(tmp_path: Path) -> None:
    """A folder with one table per hospital gives one client per file, named after the file."""
    rng = np.random.default_rng(0)
    for name, size in (("basel", 30), ("zurich", 60)):
        rows = [",".join(f"{x:.3f}" for x in rng.normal(size=3)) + f",{rng.integers(0, 3)}" for _ in range(size)]
        (tmp_path / f"processed.{name}.data").write_text("\n".join(rows))
    settings = {
        **SMALL,
        "data": {"source": str(tmp_path), "positive_above": 0},
        "partition": {"kind": "site"},
    }
    experiment = Experiment(**settings)
    assert scenario_of_seed(experiment).names == ["basel", "zurich"]
    run_rule(experiment, 0, 0, tmp_path / "journal")


def corymb(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "corymb"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


APP = '[tool.flwr.app.components]\nclientapp = "x:y"\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compare", "--rules", "fedavg,nonsense"],
            "Known names: apfl, bulyan, central, centred_clipping, ditto, fedau",
        ),
        (["simulate", "--set", "partition.alpha=0"], "partition.alpha = 0: input should be greater than 0"),
        (["simulate", "--set", "trian.steps=3"], "did you mean 'train'?"),
        (["simulate", "--set", "data.source=nowhere"], "There is no data at 'nowhere'"),
        (["simulate", "--set", "partition.clients=9999"], "needs at least 9999 examples, and there are 1438"),
        (["simulate", "nowhere.toml"], "There is no experiment 'nowhere.toml'"),
        (["simulate", "--app", "."], "has no ServerApp: set serverapp"),
        (["simulate", "--app", "nowhere"], "has no pyproject.toml"),
        (["simulate", "--app", ".", "--out", "x"], "--out, --jobs and --resume apply to experiments only"),
        (["simulate", "--set", "train.seed=3"], "set seeds"),
        (["simulate", "--out", "pyproject.toml"], "There is a file at pyproject.toml"),
        (["simulate", "[/x]"], "There is no experiment '[/x]'"),
    ],
)
def test_a_user_error_prints_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pyproject.toml").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["corymb", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:  # in this process, as importing the libraries takes seconds
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "pyproject.toml"] in ([], ["runs"])


def test_an_exception_in_a_users_code_keeps_its_traceback(tmp_path: Path) -> None:
    """E8: a mistake of use is one line, a `ValueError` of the user's module is not."""
    (tmp_path / "mine.py").write_text("def make(shape, classes):\n    return int('not a number')\n")
    (tmp_path / "mine.toml").write_text('rounds = 1\nrules = ["fedavg"]\n[model]\nkind = "mine:make"\n')
    result = corymb("simulate", "mine.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert 'mine.py", line 2, in make' in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: The model 'mine:make' cannot be made")


def test_commands_that_train_nothing_do_not_load_what_torch_compiles_with() -> None:
    """Its first optimiser in a process loads that, which takes longer than torch itself."""
    code = "import sys, corymb.simulations.results.commands; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_rules_are_listed() -> None:
    result = corymb("rules")
    assert result.returncode == 0
    for word in ("fedau", "Wang & Ji 2024", "blind", "trimmed_mean", "sighted"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "use 'fedavg' and set train.proximal" in corymb("rules", "fedprox").stderr


@pytest.mark.parametrize(("name", "words"), [
    ("fedau", ("Wang & Ji 2024", "Kind: blind (", "secure aggregation", "  cutoff = 50\n")),
    ("fedlaw", ("proxy data",)),
    ("ditto", ("  pull = 0.1\n",)),
    ("central", ("baseline",)),
    ("layerwise", ("rule (required)",)),
])  # fmt: skip
def test_a_rule_is_described(name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    cli_research.rules(name)
    described = capsys.readouterr().out
    for word in words:
        assert word in described


def test_compare_prints_a_table(tmp_path: Path) -> None:
    result = corymb(
        "compare", "--rules", "fedavg,fedau", "--seeds", "2", "--set", "rounds=2", "--set", "train.steps=1",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "±" in result.stdout
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
