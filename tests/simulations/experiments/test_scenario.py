"""Hostile clients, target sites, and what the server keeps for itself."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from pydantic import ValidationError

from corymb.protocol.settings import problems
from corymb.server import RoundRecord
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.experiments.settings import Claim
from corymb.simulations.results.claims import BEGIN, END, Finding, findings, measured, put_into, table
from corymb.simulations.results.folder import FinishedRun, is_finished
from corymb.tests.support import run_rule, scenario_of_seed

SMALL: dict[str, Any] = {"name": "small", "rounds": 2, "partition": {"clients": 5, "kind": "iid"}}


def experiment(*rules: Any, **changes: Any) -> Experiment:
    return Experiment(**{**SMALL, "rules": list(rules) or ["fedavg"], **changes})


def records(setting: Experiment, folder: Path, rule: int = 0) -> list[RoundRecord]:
    seen: list[RoundRecord] = []
    run_rule(setting, rule, 0, folder, seen.append)
    return seen


def rows(inputs: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def test_proxy_test_and_training_data_are_apart() -> None:
    setting = experiment(proxy={"examples": 53}, data={"examples": 300})
    found = scenario_of_seed(setting, 0)
    source = setting.data.load()
    assert found.proxy is not None
    assert sorted(found.proxy.targets.bincount().tolist()) == [5] * 7 + [6] * 3
    assert len(found.test) + 53 == len(source.test)
    assert rows(found.proxy.inputs) | rows(found.test.inputs) == rows(source.test.inputs)
    assert not rows(found.proxy.inputs) & rows(found.test.inputs)
    assert len(found.population.store) == 300
    assert rows(found.population.store.inputs) <= rows(source.train.inputs)
    again, other = scenario_of_seed(setting, 0), scenario_of_seed(setting, 1)
    assert torch.equal(again.population.store.inputs, found.population.store.inputs)
    assert not torch.equal(other.population.store.inputs, found.population.store.inputs)


def test_shuffled_labels_are_the_hostile_clients_only() -> None:
    clean = scenario_of_seed(experiment(), 0)
    found = scenario_of_seed(experiment(attack={"kind": "shuffled_labels", "clients": 2}), 0)
    assert len(found.hostile) == 2
    for client in range(len(found.names)):
        part = found.population.places_of(client)
        same = torch.equal(found.population.store.targets[part], clean.population.store.targets[part])
        assert same == (client not in found.hostile)
        assert np.array_equal(found.labels[client], clean.labels[client])


def test_a_target_site_has_its_own_kind_of_data() -> None:
    setting = experiment(target={"examples": 40, "noise": 0.5})
    found = scenario_of_seed(setting, 0)
    assert found.names[-1] == "target"
    assert found.population.size(len(found.names) - 1) == 40
    source = setting.data.load()
    assert (found.test.inputs - source.test.inputs).std() == pytest.approx(0.5, rel=0.05)
    assert rows(found.population.store.inputs[:-40]) < rows(source.train.inputs)
    assert not rows(found.population.store.inputs[-40:]) & rows(source.train.inputs)


@pytest.mark.parametrize("kind", ["gaussian", "sign_flip", "reversed_scores"])
def test_hostile_models_do_harm_and_a_median_helps(kind: str, tmp_path: Path) -> None:
    attack = {"kind": kind, "clients": 2, "scale": 30.0}
    setting = experiment("fedavg", "median", {"name": "fedavg", "label": "honest", "attacked": False}, attack=attack)
    mean, median, honest = (records(setting, tmp_path / str(i), i)[-1].server["accuracy"] for i in range(3))
    assert mean < median
    assert median > honest - 0.15


def test_the_target_sends_its_batches_and_trains_in_its_own_way(tmp_path: Path) -> None:
    target = {"examples": 40, "noise": 0.3, "train": {"batch_size": 10, "learning_rate": 0.01}}
    setting = experiment({"name": "fedgp", "parameters": {"target": "target", "auto": True}}, target=target)
    last = records(setting, tmp_path)[-1]
    assert 0 < last.notes["beta"] <= 1
    steps = {verdict.node: verdict.metrics["steps"] for verdict in last.verdicts}
    assert steps["target"] == 4
    assert steps["client-0"] == 9


def test_classes_and_probabilities_are_reported(tmp_path: Path) -> None:
    setting = experiment(
        {"name": "run_off", "parameters": {"abstain": True}, "train": {"report_classes": True}},
        "known_participation",
        participation={"kind": "bernoulli", "probability": 0.8},
        evaluate={"budgets": [1, 2]},
    )
    last = records(setting, tmp_path / "a")[-1]
    assert last.server["accuracy"] >= last.server["certified-1"] >= last.server["certified-2"] > 0
    assert sum(last.verdicts[0].metrics[f"examples-of-class-{c}"] for c in range(10)) == last.verdicts[0].examples
    last = records(setting, tmp_path / "b", 1)[-1]
    assert all(verdict.weight == pytest.approx(1 / 0.8 / 5) for verdict in last.admitted)


def test_rules_with_a_proxy_an_optimiser_and_an_election_run(tmp_path: Path) -> None:
    adam = {"optimizer": "Adam", "learning_rate": 0.01}
    setting = experiment(
        {"name": "fedlaw", "server_optimizer": adam},
        {"name": "fedavg", "candidate_election": ["median"]},
        proxy={"examples": 50},
    )
    assert 0.5 < records(setting, tmp_path / "a")[-1].notes["gamma"] < 2
    assert records(setting, tmp_path / "b", 1)[-1].notes["elected"] in (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": ["fedlaw"]}, "rule 'fedlaw' needs data of the server's own; set proxy.examples"),
        ({"attack": {"clients": 9}}, "attack.clients = 9 is more than the 5 clients"),
        ({"proxy": {"examples": 350}}, r"proxy.examples = 350 takes 35 of class \d, of which the test set has"),
        ({"data": {"examples": 9999}}, "data.examples = 9999 is more than the 1438 examples"),
        ({"target": {"examples": 5, "train": {"batchsize": 3}}}, r"target\.train\.batchsize is no known key"),
        ({"claims": [{"paper": "x", "rule": "ida", "least": 1}]}, "a claim is about 'ida', and the rules are fedavg"),
        ({"claims": [{"paper": "x", "rule": "fedavg"}]}, "a claim needs least, most, or both"),
        ({"rules": [{"name": "fedavg", "candidate_election": ["nobody"]}]}, "There is no rule 'nobody'"),
        (
            {"rules": [{"name": "fedavg", "server_optimizer": {"optimizer": "Adamm"}}]},
            "torch.optim cannot make 'Adamm'",
        ),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(Experiment(**{**SMALL, "rules": ["fedavg"], **changes}))


def test_every_shipped_experiment_is_whole() -> None:
    from corymb.simulations.experiments.reader import SHIPPED

    for path in SHIPPED.glob("*.toml"):
        found = read(path)
        assert found.setting or not found.claims, path.name


def test_an_experiment_may_be_based_on_another(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'based_on = "fedau"\nrounds = 7\n[participation]\nkind = "markov"\nrate = 0.2\n'
    )
    mine, base = read(tmp_path / "mine.toml"), read(Path("fedau"))
    assert (mine.rounds, mine.participation.kind, mine.name) == (7, "markov", "mine")
    assert mine.participation.model_dump()["mean"] == base.participation.model_dump()["mean"]
    assert mine.rules == base.rules


def test_claims_are_measured() -> None:
    claims = [
        {"paper": "a beats b", "rule": "a", "than": "b", "least": 5},
        {"paper": "gamma is small", "rule": "a", "measure": "gamma", "most": 1},
    ]
    rules = [{"name": "fedavg", "label": label} for label in "ab"]
    setting = experiment(*rules, claims=claims, seeds=2, setting="a test")
    made = [
        FinishedRun(rule, seed, [RoundRecord(2, notes={"gamma": 0.5 + seed})], accuracy + seed / 100, 1.0, "")
        for rule, accuracy in (("a", 0.8), ("b", 0.76))
        for seed in range(2)
    ]
    first, second = findings(resolve(setting), made)
    assert (round(first.found, 6), first.holds) == (4, False)
    assert (second.found, second.holds) == (1.0, True)
    text = table({"small": (setting, [first, second])})
    assert "| a beats b | a 80.50 ± 0.71, b 76.50 ± 0.71: +4.00 | ≥ 5 | **no** |" in text
    assert "| gamma is small | a gamma 1.000 ± 0.707 | ≤ 1 | yes |" in text
    with pytest.raises(ValueError, match="No round of 'a' recorded 'delta'; there are gamma"):
        measured("delta", made[0], setting, set())


def test_finished_results_are_known_again(tmp_path: Path) -> None:
    setting = experiment(seeds=1)
    assert not is_finished(setting, tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.toml").write_text(tomli_w.dumps(setting.model_dump(mode="json", exclude_none=True)))
    assert is_finished(setting, tmp_path)
    claims = [{"paper": "x", "rule": "fedavg", "least": 1}]
    assert is_finished(experiment(seeds=1, claims=claims, setting="told otherwise"), tmp_path)
    assert not is_finished(experiment(seeds=2), tmp_path)


def test_the_table_takes_its_place_in_a_document() -> None:
    once = put_into("# Title\n\nText.\n", "one\n")
    assert once == f"# Title\n\nText.\n\n{BEGIN}\none\n{END}\n"
    assert put_into(once + "After.\n", "two\n") == f"# Title\n\nText.\n\n{BEGIN}\ntwo\n{END}\nAfter.\n"
    assert Finding(Claim(paper="", rule="a", most=1.0), [1.0]).holds


def test_a_key_of_another_kind_is_an_error() -> None:
    """FAULTS S18."""
    for changes, message in (
        (
            {"participation": {"kind": "bernoulli", "probability": 0.9, "cycle": 7}},
            r"participation\.cycle is no known key",
        ),
        ({"partition": {"kind": "iid", "alpha": 7}}, r"partition\.alpha is no known key \(known here: clients, kind\)"),
        ({"partition": {"kind": "site", "clients": 3}}, r"partition\.clients is no known key \(known here: kind\)"),
        ({"attack": {"kind": "shuffled_labels", "clients": 1, "scale": 2.0}}, r"attack\.scale is no known key"),
        ({"partition": {"alfa": 7}}, r"partition\.alfa is no known key \(did you mean 'alpha'\?\)"),
        (
            {"participation": {"kind": "bernouli"}},
            "kind = 'bernouli' is unknown; choose one of always, bernoulli, cyclic",
        ),
        ({"participation": {"kind": "trace"}}, r"participation\.path: field required"),
    ):
        with pytest.raises(ValidationError) as caught:
            Experiment(**{**SMALL, "partition": {"clients": 5}, "rules": ["fedavg"], **changes})
        assert re.search(message, problems(caught.value, Experiment)), problems(caught.value, Experiment)
    with pytest.raises(ValueError, match=r"data\.label is of no use to the digits at 'digits'; leave it out"):
        resolve(experiment(data={"label": "x"}))


class Lunar:
    """Odd clients in odd rounds."""

    def __init__(self, labels: np.ndarray[Any, Any], rng: np.random.Generator, phase: int = 0) -> None:
        self._clients, self._round = np.arange(len(labels)), phase

    def step(self) -> np.ndarray[Any, Any]:
        self._round += 1
        online: np.ndarray[Any, Any] = self._clients % 2 == self._round % 2
        return online


def halves(targets: np.ndarray[Any, Any], rng: np.random.Generator, names: int = 2) -> dict[str, list[int]]:
    return {f"half-{part}": list(range(part, len(targets), names)) for part in range(names)}


def blobs(size: int = 60) -> tuple[np.ndarray[Any, Any], ...]:
    rng = np.random.default_rng(0)
    y = np.arange(size) % 3
    x = rng.normal(size=(size, 4)) + y[:, None]
    return x, y, x[:30], y[:30]


def test_participation_partition_and_data_of_ones_own(tmp_path: Path) -> None:
    """As functions by reference; `with_kind` and `Registry` find those of installed packages by name."""
    here = "corymb.tests.simulations.experiments.test_scenario"
    setting = experiment(
        data={"source": f"{here}:blobs", "options": {"size": 90}},
        partition={"kind": f"{here}:halves", "options": {"names": 3}},
        participation={"kind": f"{here}:Lunar", "options": {"phase": 1}},
    )
    assert Experiment(**tomllib.loads(tomli_w.dumps(setting.model_dump(mode="json", exclude_none=True)))) == setting
    rounds = records(setting, tmp_path)
    assert [[verdict.node for verdict in record.admitted] for record in rounds] == [["half-0", "half-2"], ["half-1"]]
    for wrong, message in (
        ({"participation": {"kind": f"{here}:blobs"}}, "takes from 0 to 1 positional arguments"),
        ({"partition": {"kind": f"{here}:nothing"}}, "'.*:nothing' cannot be imported"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            resolve(experiment(**wrong))


def counted(calls: Counter[str], name: str, original: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return original(*args, **options)

    return call


def test_an_experiment_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS P4: one scenario for a seed, one proof for a model, one engine for the clients of a seed."""
    from rich.console import Console

    from corymb.simulations.engine import factory
    from corymb.simulations.experiments import resolved
    from corymb.simulations.results import run
    from corymb.simulations.results.runner import run_all

    calls: Counter[str] = Counter()
    for module, name in (
        (resolved, "scenario_of"),
        (factory, "_prove"),
        (run, "make_engine"),
        (resolved, "make_model"),
    ):
        monkeypatch.setattr(module, name, counted(calls, name, getattr(module, name)))
    setting = experiment("fedavg", "median", "ida", "fedau", seeds=3)
    (runs,) = run_all([(resolve(setting), tmp_path)], Console(quiet=True))
    assert len(runs) == 12
    assert calls.pop("make_model") < 30
    assert calls == {"scenario_of": 3, "_prove": 1, "make_engine": 3}
