"""The tests of a run's models: at the server, of a backdoor, of an election, and at every client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import nn

from corymb.protocol.codec import to_state
from corymb.protocol.shared_state import personal_names
from corymb.protocol.train_settings import TrainSettings
from corymb.server.rounds.record import Verdict
from corymb.simulations.data.data_attacks import Backdoor
from corymb.simulations.data.examples import Examples
from corymb.simulations.experiments.resolved import Resolved
from corymb.simulations.experiments.scenario import Scenario
from corymb.simulations.results.central_test import CentralTest
from corymb.simulations.results.client_tests import ClientTests
from corymb.strategies import Proxy, Rule, VotingRule
from corymb.strategies.voting.election import certified_accuracy

VALIDATION = "validation-"  # before the name of a metric that is measured on the validation part


class ModelTests:
    """Tests the models of a run of `rule` in `threads` threads or processes.

    `module` is the run's module; `config` is the clients' run config. The server does not test a model of which layers
    stay at the clients.
    """

    def __init__(
        self, resolved: Resolved, scenario: Scenario, rule: Rule[Any], module: nn.Module, settings: TrainSettings,
        config: Mapping[str, Any], threads: int,
    ) -> None:  # fmt: skip
        self._resolved, self._rule, self._module = resolved, rule, module
        attack = resolved.experiment.attack
        self._has_personal = bool(personal_names(module, settings))
        self._central = CentralTest(module, scenario.test, threads, resolved.task)
        self._validation = None
        if scenario.validation is not None:
            self._validation = CentralTest(module, scenario.validation, threads, resolved.task)
        self._backdoor = None
        if isinstance(attack, Backdoor) and scenario.hostile:
            self._backdoor = CentralTest(module, attack.test_set(scenario.test), threads, resolved.task)
        parts = {"": scenario.test} | ({} if scenario.validation is None else {VALIDATION: scenario.validation})
        self._voting: dict[str, Proxy] = {}
        if isinstance(rule, VotingRule):
            self._voting = {prefix: proxy_of(resolved, part) for prefix, part in parts.items()}
        # At the clients: the prefix of the metrics, and the tests on the clients' test or validation parts.
        self._at_clients = [
            (prefix, ClientTests(resolved.model, scenario, examples, config, threads))
            for prefix, examples in (("", scenario.tests), (VALIDATION, scenario.validations))
            if examples is not None
        ]

    def close(self) -> None:
        """End the processes."""
        for _, tests in self._at_clients:
            tests.close()

    def measure(
        self, server_round: int, arrays: ArrayRecord, memory: Any
    ) -> tuple[dict[str, float], tuple[Verdict, ...]] | None:
        """Return the metrics after a round and the verdicts on the clients' tests; None in rounds without a test.

        `memory` is that of the rule.
        """
        experiment = self._resolved.experiment
        if server_round % experiment.evaluate.every and server_round != experiment.rounds:
            return None
        metrics: dict[str, float] = {}
        if isinstance(self._rule, VotingRule):
            if memory.models is None:  # there are no voters
                return None
            for prefix, part in self._voting.items():
                elected = _voting_metrics(self._rule, memory, part, experiment.evaluate.budgets)
                metrics |= {prefix + name: value for name, value in elected.items()}
            return metrics, ()
        if not self._has_personal:
            self._module.load_state_dict({**self._module.state_dict(), **to_state(arrays)})
            metrics = self._central.metrics()
            if self._validation is not None:
                metrics |= {VALIDATION + name: value for name, value in self._validation.metrics().items()}
            if self._backdoor is not None:
                metrics["backdoor"] = self._backdoor.metrics()["accuracy"]
        verdicts: tuple[Verdict, ...] = ()
        for prefix, tests in self._at_clients if server_round else ():
            found = tests.verdicts(arrays, server_round)
            metrics |= {prefix + name: value for name, value in tests.summary(found).items()}
            verdicts = verdicts or found  # the records of clients are those of the tests, which come first
        return metrics, verdicts


def proxy_of(resolved: Resolved, examples: Examples) -> Proxy:
    """Return `examples` with a new module, without drawing from the random numbers of the run."""
    with torch.random.fork_rng(devices=[]):
        return Proxy(resolved.model().eval(), examples.inputs, examples.targets, resolved.task.loss)


def _voting_metrics(rule: VotingRule, memory: Any, test: Proxy, budgets: list[int]) -> dict[str, float]:
    """Return the accuracy of the elected classes, and the certified accuracy per budget."""
    election = rule.vote(memory, test)
    accuracy = float((election.classes == test.labels).double().mean())
    certified = {f"certified-{budget}": certified_accuracy(election, test.labels, budget) for budget in budgets}
    return {"accuracy": accuracy, **certified}
