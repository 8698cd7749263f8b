"""Tests of scenarios: hostile clients, the target client, proxy data, claims, and user-supplied functions."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from corymb.server import RoundRecord
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.reader import read
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.experiments.settings import Claim
from corymb.simulations.results.claims import BEGIN, END, Finding, findings, measured, put_into, table
from corymb.simulations.results.folder import FinishedRun
from corymb.simulations.results.stored import is_finished
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


def test_proxy_test_and_training_data_are_disjoint() -> None:
    setting = experiment(proxy={"examples": 53}, data={"examples": 300})
    scenario = scenario_of_seed(setting, 0)
    source = setting.data.load()
    assert scenario.proxy is not None
    assert sorted(scenario.proxy.targets.bincount().tolist()) == [5] * 7 + [6] * 3
    assert len(scenario.test) + 53 == len(source.test)
    assert rows(scenario.proxy.inputs) | rows(scenario.test.inputs) == rows(source.test.inputs)
    assert not rows(scenario.proxy.inputs) & rows(scenario.test.inputs)
    assert len(scenario.population.store) == 300
    assert rows(scenario.population.store.inputs) <= rows(source.train.inputs)
    again, other = scenario_of_seed(setting, 0), scenario_of_seed(setting, 1)
    assert torch.equal(again.population.store.inputs, scenario.population.store.inputs)
    assert not torch.equal(other.population.store.inputs, scenario.population.store.inputs)


def test_only_the_labels_of_hostile_clients_are_shuffled() -> None:
    clean = scenario_of_seed(experiment(), 0)
    scenario = scenario_of_seed(experiment(attack={"kind": "shuffled_labels", "clients": 2}), 0)
    assert len(scenario.hostile) == 2
    for client in range(len(scenario.names)):
        part = scenario.population.store_positions_of(client)
        same = torch.equal(scenario.population.store.targets[part], clean.population.store.targets[part])
        assert same == (client not in scenario.hostile)
        assert np.array_equal(scenario.labels[client], clean.labels[client])


def test_target_client_and_test_set_have_noisy_inputs() -> None:
    setting = experiment(target={"examples": 40, "noise": 0.5})
    scenario = scenario_of_seed(setting, 0)
    assert scenario.names[-1] == "target"
    assert scenario.population.size(len(scenario.names) - 1) == 40
    source = setting.data.load()
    assert (scenario.test.inputs - source.test.inputs).std() == pytest.approx(0.5, rel=0.05)
    assert rows(scenario.population.store.inputs[:-40]) < rows(source.train.inputs)
    assert not rows(scenario.population.store.inputs[-40:]) & rows(source.train.inputs)


@pytest.mark.parametrize("kind", ["gaussian", "sign_flip", "reversed_scores"])
def test_model_attacks_harm_the_mean_but_not_the_median(kind: str, tmp_path: Path) -> None:
    attack = {"kind": kind, "clients": 2, "scale": 30.0}
    setting = experiment("fedavg", "median", {"name": "fedavg", "label": "honest", "attacked": False}, attack=attack)
    mean, median, honest = (records(setting, tmp_path / str(i), i)[-1].server["accuracy"] for i in range(3))
    assert mean < median
    assert median > honest - 0.15


def test_the_target_client_sends_batch_updates_and_has_its_own_settings(tmp_path: Path) -> None:
    target = {"examples": 40, "noise": 0.3, "train": {"batch_size": 10, "learning_rate": 0.01}}
    setting = experiment({"name": "fedgp", "parameters": {"target": "target", "auto": True}}, target=target)
    last = records(setting, tmp_path)[-1]
    assert 0 < last.notes["beta"] <= 1
    steps = {verdict.node: verdict.metrics["steps"] for verdict in last.verdicts}
    assert steps["target"] == 4
    assert steps["client-0"] == 9


def test_class_counts_and_participation_probabilities_are_reported(tmp_path: Path) -> None:
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


def test_rules_with_proxy_server_optimizer_and_candidate_election_run(tmp_path: Path) -> None:
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
        ({"rules": ["fedlaw"]}, "rule 'fedlaw' needs proxy data; set proxy.examples"),
        ({"attack": {"clients": 9}}, "attack.clients = 9 is more than the 5 clients"),
        (
            {"proxy": {"examples": 350}},
            r"proxy.examples = 350 takes 35 examples of class \d from the test set, which has",
        ),
        ({"data": {"examples": 9999}}, "data.examples = 9999 is more than the 1438 training examples"),
        ({"target": {"examples": 5, "train": {"batchsize": 3}}}, r"target\.train\.batchsize is not a known key"),
        ({"claims": [{"claim": "x", "rule": "ida", "least": 1}]}, "a claim names the rule 'ida'; the rules are fedavg"),
        ({"claims": [{"claim": "x", "rule": "fedavg"}]}, "a claim has no bounds; set least, most, or both"),
        ({"rules": [{"name": "fedavg", "candidate_election": ["nobody"]}]}, "Unknown rule 'nobody'"),
        (
            {"rules": [{"name": "fedavg", "server_optimizer": {"optimizer": "Adamm"}}]},
            "server optimiser 'Adamm' cannot be used",
        ),
    ],
)
def test_invalid_experiments_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(Experiment(**{**SMALL, "rules": ["fedavg"], **changes}))


def test_every_shipped_experiment_with_claims_has_a_setting() -> None:
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
        {"claim": "a beats b", "rule": "a", "than": "b", "least": 5},
        {"claim": "gamma is small", "rule": "a", "measure": "gamma", "most": 1},
    ]
    rules = [{"name": "fedavg", "label": label} for label in "ab"]
    setting = experiment(*rules, claims=claims, seeds=2, setting="a test")
    made = [
        FinishedRun(rule, seed, [RoundRecord(2, notes={"gamma": 0.5 + seed})], accuracy + seed / 100, 1.0, "")
        for rule, accuracy in (("a", 0.8), ("b", 0.76))
        for seed in range(2)
    ]
    first, second = findings(resolve(setting), made)
    assert (round(first.result, 6), first.holds) == (4, False)
    assert (second.result, second.holds) == (1.0, True)
    text = table({"small": (setting, [first, second])})
    assert "| a beats b | a 80.50 ± 0.71, b 76.50 ± 0.71: +4.00 | ≥ 5 | **no** |" in text
    assert "| gamma is small | a gamma 1.000 ± 0.707 | ≤ 1 | yes |" in text
    with pytest.raises(ValueError, match="No round of 'a' recorded 'delta'; it recorded gamma"):
        measured("delta", made[0], setting, set())


def test_is_finished_ignores_settings_without_effect_on_results(tmp_path: Path) -> None:
    setting = experiment(seeds=1)
    assert not is_finished(setting, tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.toml").write_text(tomli_w.dumps(setting.model_dump(mode="json", exclude_none=True)))
    assert is_finished(setting, tmp_path)
    claims = [{"claim": "x", "rule": "fedavg", "least": 1}]
    assert is_finished(experiment(seeds=1, claims=claims, setting="another text"), tmp_path)
    assert not is_finished(experiment(seeds=2), tmp_path)


def test_the_table_replaces_the_text_between_its_markers() -> None:
    once = put_into("# Title\n\nText.\n", "one\n")
    assert once == f"# Title\n\nText.\n\n{BEGIN}\none\n{END}\n"
    assert put_into(once + "After.\n", "two\n") == f"# Title\n\nText.\n\n{BEGIN}\ntwo\n{END}\nAfter.\n"
    assert Finding(Claim(claim="", rule="a", most=1.0), [1.0]).holds


def test_a_key_of_another_kind_is_an_error() -> None:
    for changes, message in (
        (
            {"participation": {"kind": "bernoulli", "probability": 0.9, "cycle": 7}},
            r"participation\.cycle is a key of kind = 'cyclic' only \(known keys: alpha, kind",
        ),
        (
            {"partition": {"kind": "iid", "alpha": 7}},
            r"partition\.alpha is a key of kind = .*'dirichlet'.* only \(known keys: clients, kind\)",
        ),
        (
            {"partition": {"kind": "site", "clients": 3}},
            r"partition\.clients is a key of kind = .* only \(known keys: kind\)",
        ),
        ({"attack": {"kind": "shuffled_labels", "clients": 1, "scale": 2.0}}, r"attack\.scale is a key of kind = "),
        ({"evaluate": {"clients": True, "new_clients": True}}, "evaluate: new_clients = true is not a number"),
        ({"rounds": True}, "rounds = true is not a number"),
        ({"batch_size": 3}, r"batch_size is not a known key \(did you mean 'train\.batch_size'\?\)"),
        ({"alpha": 3}, r"\(did you mean 'partition\.alpha' or 'participation\.alpha'\?\)"),
        ({"partition": {"alfa": 7}}, r"partition\.alfa is not a known key \(did you mean 'alpha'\?\)"),
        (
            {"participation": {"kind": "bernouli"}},
            "kind = 'bernouli' is unknown; choose one of always, bernoulli, cyclic",
        ),
        ({"participation": {"kind": "trace"}}, r"participation\.path is required"),
        ({"train": {"algorithm": "scaffold"}}, "'fedavg' run an algorithm that needs what the rule 'scaffold' sends"),
    ):
        with pytest.raises(ValueError, match=f"^The experiment [a-z]+ is invalid: .*{message}"):
            Experiment(**{**SMALL, "partition": {"clients": 5}, "rules": ["fedavg"], **changes})
    with pytest.raises(ValueError, match=r"data\.label does not apply to the digits at 'digits'; remove it"):
        resolve(experiment(data={"label": "x"}))


class Alternating:
    """Odd clients are online in odd rounds, even clients in even rounds."""

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


def test_user_supplied_participation_partition_and_data(tmp_path: Path) -> None:
    """Given as "module:name"; names registered by installed packages go through the same `Registry`."""
    here = "corymb.tests.simulations.experiments.test_scenario"
    setting = experiment(
        data={"source": f"{here}:blobs", "options": {"size": 90}},
        partition={"kind": f"{here}:halves", "options": {"names": 3}},
        participation={"kind": f"{here}:Alternating", "options": {"phase": 1}},
    )
    assert Experiment(**tomllib.loads(tomli_w.dumps(setting.model_dump(mode="json", exclude_none=True)))) == setting
    rounds = records(setting, tmp_path)
    assert [[verdict.node for verdict in record.admitted] for record in rounds] == [["half-0", "half-2"], ["half-1"]]
    for wrong, message in (
        ({"participation": {"kind": f"{here}:blobs"}}, "too many positional arguments"),
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
    """One scenario per seed, one engine check per model, one engine per scenario."""
    from rich.console import Console

    from corymb.simulations.engine import factory
    from corymb.simulations.experiments import resolved
    from corymb.simulations.results import run
    from corymb.simulations.results.runner import run_all

    calls: Counter[str] = Counter()
    for module, name in (
        (resolved, "scenario_of"),
        (factory, "prove"),
        (run, "make_engine"),
        (resolved, "make_model"),
    ):
        monkeypatch.setattr(module, name, counted(calls, name, getattr(module, name)))
    setting = experiment("fedavg", "median", "ida", "fedau", seeds=3)
    (runs,) = run_all([(resolve(setting), tmp_path)], Console(quiet=True))
    assert len(runs) == 12
    assert calls.pop("make_model") < 30
    assert calls == {"scenario_of": 3, "prove": 1, "make_engine": 3}
