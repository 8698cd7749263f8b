"""Experiments from Python, tests at the clients, baselines, summaries and sweeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, train
from corymb.client.app import batch_generator, make_seeded
from corymb.client.batches import training_batches
from corymb.server import RoundRecord
from corymb.server.rounds.record import Verdict
from corymb.simulations import Experiment, Results, run
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.results.client_results import client_results
from corymb.simulations.results.folder import FinishedRun, final_score
from corymb.simulations.results.score import Score
from corymb.simulations.results.summary import further_metrics

SMALL: dict[str, Any] = {
    "name": "small", "rounds": 3, "partition": {"clients": 6, "alpha": 0.5}, "evaluate": {"clients": True},
    "rules": ["fedavg", "local", "central"], "seeds": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(Experiment(**SMALL), folder=tmp_path_factory.mktemp("small"), progress=False)


def test_rows_and_frames(results: Results) -> None:
    summary = results.frame()
    assert set(summary["rule"]) == {"fedavg", "local", "central"}
    assert {"clients-accuracy", "worst tenth", "over clients", "better than local", "MB up"} <= set(summary.columns)
    rounds = results.frame("rounds")
    assert len(rounds) == 9
    assert rounds["bytes_up"].iloc[0] > 0
    clients = results.frame("clients")
    tests = clients[(clients["phase"] == "test") & (clients["rule"] == "local") & (clients["round"] == 3)]
    assert len(tests) == 6
    mean = summary.set_index("rule")["clients-accuracy"]["local"]
    assert mean == pytest.approx(tests["accuracy"].mean())
    shared = summary.set_index("rule")["accuracy"]  # at the server
    last = rounds[rounds["round"] == 3].set_index("rule")["accuracy"]
    assert shared["fedavg"] == pytest.approx(last["fedavg"])
    assert isnan(shared["local"]), "there is no shared model"
    with pytest.raises(ValueError, match="no rows of 'client'; use 'summary', 'rounds' or 'clients'"):
        results.rows("client")


def test_tables_and_pictures(results: Results) -> None:
    lines = results.table().splitlines()
    assert lines[0].startswith("| rule | clients-accuracy | over seeds |")
    assert len(lines) == 5
    assert results.table("csv").splitlines()[1].split(",")[2] == "", "one seed has no deviation"
    assert results.table("csv").splitlines()[0].startswith("rule,clients-accuracy,")
    latex = results.table("latex")
    assert latex.startswith("\\begin{tabular}{lrr")
    assert "\\\\" in latex
    with pytest.raises(ValueError, match="format 'html' is unknown; use one of markdown, latex, csv"):
        results.table("html")
    assert results.plot("clients").axes[0].get_xlabel() == "accuracy in % at a client"
    assert "<td>fedavg</td>" in results._repr_html_()
    page = results.report.read_text()
    assert "better than local" in page
    assert "client-5" in page


def test_local_is_training_alone_and_central_is_pooled(results: Results) -> None:
    """Both against plain loops; a client that trains alone gives the same bits, see tests/client/algorithms."""
    resolved = resolve(Experiment(**SMALL))
    settings = TrainSettings()

    def alone(rows: TensorDataset, identity: int) -> dict[str, torch.Tensor]:
        module = make_seeded(resolved.model, 0)
        for number in (1, 2, 3):
            train(module, training_batches(rows, settings, batch_generator(0, identity, number)), settings)
        return dict(module.state_dict())

    scenario = resolved.scenario(resolved.experiment.rules[1], 0)
    folders = results.folder / "journals" / "local-seed0" / "clients"
    kept = [load_file(folder / "000003.safetensors") for folder in folders.iterdir()]
    assert len(kept) == 6
    for client in range(6):
        expected = alone(TensorDataset(*scenario.population.examples(client)), client)
        assert any(
            all(torch.allclose(k[f"personal.{n}"], t, rtol=1e-4, atol=1e-6) for n, t in expected.items()) for k in kept
        )
    pooled = resolved.scenario(resolved.experiment.rules[2], 0)
    assert pooled.names[-1] == "central"
    examples = TensorDataset(*pooled.population.examples(6))
    assert len(examples) == sum(scenario.population.size(client) for client in range(6))
    expected = alone(examples, 6)
    model = load_file(results.folder / "journals" / "central-seed0" / "model-000003.safetensors")
    for name, tensor in model.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_no_test_example_is_trained_on(results: Results) -> None:
    scenario = results.resolved.first
    assert scenario.tests is not None
    for client in range(6):
        trained = set(scenario.population.store_positions_of(client).tolist())
        tested = set(scenario.tests.store_positions_of(client).tolist())
        assert not trained & tested
        assert len(tested) == max(1, round(0.2 * (len(trained) + len(tested))))


def test_a_column_stays_empty_where_it_would_compare_two_models(tmp_path: Path) -> None:
    """Ditto's clients test their own model, and report the shared one's training loss; "local" has none for others."""
    rules = ["fedavg", "local", "ditto"]
    settings = {**SMALL, "rules": rules, "evaluate": {"clients": True, "new_clients": 2}}
    found = run(Experiment(**settings), folder=tmp_path, progress=False)
    of = {each.rule: each for each in client_results(found.runs)}
    assert {rule for rule in rules if isnan(of[rule].gap)} == {"ditto"}
    assert {rule for rule in rules if isnan(of[rule].new)} == {"local"}


def test_new_clients_only_test(tmp_path: Path) -> None:
    settings = {**SMALL, "rules": ["fedavg"], "evaluate": {"clients": True, "new_clients": 2}}
    found = run(Experiment(**settings), folder=tmp_path, progress=False)
    new = set(found.resolved.first.new_names)
    assert len(new) == 2
    clients = found.rows("clients")
    assert not {row["client"] for row in clients if row["phase"] == "train"} & new
    assert {row["client"] for row in clients if row["phase"] == "test"} == set(found.resolved.first.names)
    last = found.runs[0].records[-1].server
    assert last["new-clients-accuracy"] > 0
    lines = (tmp_path / "clients.jsonl").read_text().splitlines()
    assert {"phase": "evaluate", "node": min(new)}.items() <= json.loads(
        next(line for line in lines if f'"{min(new)}"' in line)
    ).items()


def test_data_from_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(90, 4)).astype(np.float32)
    targets = (inputs.sum(axis=1) > 0).astype(int)
    frame = pd.DataFrame(inputs, columns=list("abcd")).assign(label=targets, place=["x", "y", "z"] * 30)
    dataset = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(targets))
    base = {**SMALL, "rules": ["fedavg"], "evaluate": {}}
    forms: dict[str, Any] = {
        "arrays": (inputs, targets), "a split": (inputs, targets, inputs, targets), "a dataset": dataset,
        "two datasets": (dataset, dataset), "a frame": frame.drop(columns="place"),
    }  # fmt: skip
    for name, data in forms.items():
        found = run(Experiment(**base), data=data, folder=tmp_path / name, progress=False)
        assert found.runs[0].final > 0.5, name
    sites = Experiment(**{**base, "partition": {"kind": "site"}, "data": {"site": "place"}})
    found = run(sites, data=frame, folder=tmp_path / "sites", progress=False)
    assert found.resolved.first.names == ["x", "y", "z"]
    with pytest.raises(ValueError, match=r"The data cannot be used: they are a str; return a Source"):
        run(Experiment(**base), data="digits", folder=tmp_path / "wrong")
    with pytest.raises(ValueError, match="the column 'place' of the frame has values that are no numbers, such as 'x'"):
        run(Experiment(**base), data=frame, folder=tmp_path / "wrong")


def test_the_command_table(results: Results) -> None:
    command = [sys.executable, "-m", "corymb.cli", "table", str(results.folder), "--format", "csv"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == results.table("csv")


def test_personal_layers_need_tests_at_the_clients() -> None:
    with pytest.raises(ValueError, match="layers stay at the clients, so the server cannot test its model"):
        resolve(Experiment(**{**SMALL, "rules": ["fedper"], "model": {"kind": "mlp"}, "evaluate": {}}))
    with pytest.raises(ValueError, match="has only one layer, which stays at the clients"):
        resolve(Experiment(**{**SMALL, "rules": ["fedper"], "model": {"kind": "softmax"}}))
    with pytest.raises(ValueError, match="personal = 'head' matches no entry of the model, which has"):
        resolve(Experiment(**{**SMALL, "train": {"personal": ["head"]}}))


def test_a_metric_that_a_rule_lacks_leaves_its_cell_empty() -> None:
    first, second = Score("mae", "mae"), Score("r2", "r2")
    runs = [
        FinishedRun("local", 0, [], 1.0, 1.0, "", first, {second: 0.5}),
        FinishedRun("fedavg", 0, [], 1.0, 1.0, "", first, {first: 0.25, second: 0.75}),
    ]
    assert further_metrics(runs) == {
        second: {"local": "0.5000", "fedavg": "0.7500"}, first: {"local": "", "fedavg": "0.2500"}
    }  # fmt: skip


def test_a_run_that_has_diverged_has_no_final_score() -> None:
    def records(*tests: dict[str, float]) -> list[RoundRecord]:
        return [RoundRecord(number, server=test) for number, test in enumerate(tests, 1)]

    good, bad = {"loss": 1.0, "perplexity": 3.0}, {"loss": 500.0}
    assert final_score(records(good, {}, good, good), "perplexity", 2) == 3.0
    assert final_score(records(good, {}), "perplexity", 1) == 3.0  # the last test before
    assert math.isnan(final_score(records(good, good, bad), "perplexity", 1) or 0.0)
    assert final_score(records(bad, bad), "perplexity", 0) is None
    assert final_score(records({}, {}), "perplexity", 0) is None


def test_what_is_said_of_clients_together_is_said_of_each_run() -> None:
    """Under another seed, the clients of the same names are others: 0 and 1 change places."""
    score = Score("accuracy", "clients-accuracy")

    def finished(rule: str, seed: int, *scores: float) -> FinishedRun:
        tests = tuple(
            Verdict(f"client-{i}", "admitted", examples=10, metrics={"accuracy": value})
            for i, value in enumerate(scores)
        )
        record = RoundRecord(1, evaluations=tests, server={"clients-loss": 1.0}, train={"loss": 0.5})
        return FinishedRun(rule, seed, [record], 0.0, 1.0, "", score)

    runs = [finished("fedavg", 0, 0.2, 0.8), finished("fedavg", 1, 0.8, 0.2)]
    runs += [finished("local", 0, 0.3, 0.3), finished("local", 1, 0.3, 0.3)]
    (best,) = [found for found in client_results(runs) if found.rule == "fedavg"]
    assert (best.mean, best.worst_tenth, best.gaining, best.gap) == pytest.approx((0.5, 0.2, 0.5, 0.5))
    assert best.deviation == pytest.approx(float(np.std([0.2, 0.8], ddof=1)))
    assert sorted(best.values) == [0.2, 0.2, 0.8, 0.8]
