"""One run of an experiment: one rule on the clients of one seed, from the initial model to the journal."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid
from torch.utils.data import TensorDataset

from corymb.client import make_client_app
from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Journal, RoundRecord
from corymb.server.rounds.record import ADMITTED
from corymb.server.rounds.rejections import Code
from corymb.simulations.data.clients import Client
from corymb.simulations.data.data_attacks import Backdoor
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.random_start import with_random_start
from corymb.simulations.engine.cohort_app import CohortApp
from corymb.simulations.engine.factory import make_engine
from corymb.simulations.experiments.resolved import Key, Resolved
from corymb.simulations.experiments.scenario import TARGET, participation_of
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.results.central_test import CentralTest
from corymb.strategies import Proxy, VotingRule
from corymb.strategies.voting.election import certified_accuracy

log = logging.getLogger("flwr.corymb")
OnRound = Callable[[RoundRecord], None]


@contextmanager
def clients_of(resolved: Resolved, key: Key, workers: int = 1) -> Iterator[Client]:
    """Yield the client app of one scenario, with its hostile clients; the training engine closes with the context.

    The engine may use up to `workers` processes.
    """
    experiment, scenario, (seed, attacks) = resolved.experiment, resolved.scenarios[key], key
    population = scenario.population.in_order()

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        examples = TensorDataset(*population.examples(int(context.node_config["partition-id"])))
        return examples, examples

    app: Client = make_client_app(resolved.model, data)
    engine = None
    if resolved.trainer is not None:
        layout = resolved.layout
        engine = make_engine(experiment.engine, resolved.trainer, population, layout, workers, resolved.device)
        app = CohortApp(engine, population, layout, app, experiment.blocks)
    if experiment.model.random_start:
        app = with_random_start(app, resolved.model, seed)
    if scenario.hostile and attacks:
        app = experiment.attack.wrap(app, scenario.hostile, seed)
    try:
        yield app
    finally:
        if engine is not None:
            engine.close()


class Run:
    """A run of `rule` with `seed`.

    The partition, the participation and the initial model depend only on the seed, so all rules get the same ones.
    """

    def __init__(self, resolved: Resolved, rule: ExperimentRule, seed: int) -> None:
        self._resolved, self._rule, self._seed = resolved, rule, seed
        self.scenario = resolved.scenario(rule, seed)
        self.participation, self._probabilities = participation_of(resolved.experiment, self.scenario, seed)
        self.settings = resolved.experiment.train_for(rule).model_copy(update={"seed": seed})

    def node_config(self, client: int) -> dict[str, Any]:
        """Return the entries of a client's node config besides its partition."""
        config = {} if self._probabilities is None else {"participation": float(self._probabilities[client])}
        experiment = self._resolved.experiment
        is_target = experiment.target.examples and self.scenario.names[client] == TARGET
        return config | (experiment.target_train().flat() if is_target else {})

    def run_locally(self, clients: Client, folder: Path, on_round: OnRound | None = None, workers: int = 1) -> None:
        """Run all rounds with `clients` on a `LocalGrid` with this many `workers`; write the journal to `folder`."""
        config = self.settings.flat()
        grid = LocalGrid(clients, self.scenario.names, run_config=config, node_config=self.node_config, workers=workers)
        with closing(grid):
            self.serve(grid, folder, on_round, workers)

    def serve(self, grid: Grid, folder: Path, on_round: OnRound | None = None, threads: int = 1) -> None:
        """Run the rounds that are not yet in the journal in `folder`, over the nodes of `grid` that are online.

        Writes the journal and calls `on_round` after each round.
        The server's metrics are the test accuracy and loss, measured in `threads` threads.
        """
        experiment, scenario = self._resolved.experiment, self.scenario
        torch.manual_seed(self._seed)
        module = self._resolved.model()
        central_test = CentralTest(module, scenario.test, threads)
        attack = experiment.attack
        backdoor_test = None
        if isinstance(attack, Backdoor) and scenario.hostile:
            backdoor_test = CentralTest(module, attack.test_set(scenario.test), threads)
        rule = self._rule.make()
        voting_test = self._proxy(scenario.test) if isinstance(rule, VotingRule) else None

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round % experiment.evaluate.every and server_round != experiment.rounds:
                return None
            if voting_test is not None and isinstance(rule, VotingRule):
                return _voting_metrics(rule, strategy.state.memory, voting_test, experiment.evaluate.budgets)
            module.load_state_dict(to_state(arrays))
            metrics = central_test.metrics()
            if backdoor_test is not None:
                metrics["backdoor"] = backdoor_test.metrics()["accuracy"]
            return MetricRecord(dict(metrics))

        def after_round(record: RoundRecord) -> None:
            failures.check(record)
            if on_round is not None:
                on_round(record)

        failures = _FailureCheck()
        with closing(Journal(folder, durable=False)) as journal:
            strategy = FlowerStrategy(
                rule,
                server_optimizer=self._rule.make_server_optimizer(),
                candidate_election=self._rule.make_election(),
                proxy=self._proxy(scenario.proxy) if scenario.proxy else None,
                fraction_train=experiment.fraction,
                fraction_evaluate=0,
                min_train_nodes=1,
                min_available_nodes=1,
                seed=self._seed,
                journal=journal,
                resume=True,  # a run that begins anew has an empty folder
                on_round=after_round,
                buffers=[entry.name for entry in self._resolved.layout.buffers],
            )
            initial = to_arrays({name: tensor.clone() for name, tensor in module.state_dict().items()})
            # Clients run while their replies are pulled, so a timeout would make results depend on the machine.
            online = with_availability(grid, self.participation, journal.last_whole_round())
            strategy.start(online, initial, experiment.rounds, timeout=inf, evaluate_fn=evaluate_fn)

    def _proxy(self, examples: Examples) -> Proxy:
        """Return `examples` with a new module, without drawing from the random numbers of the run."""
        with torch.random.fork_rng(devices=[]):
            return Proxy(self._resolved.model().eval(), examples.inputs, examples.targets)


class _FailureCheck:
    """Stops a run as soon as all clients fail."""

    def __init__(self) -> None:
        self._codes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def check(self, record: RoundRecord) -> None:
        """Raise `ValueError` if every client that was online so far has replied with an error."""
        verdicts = [verdict for verdict in record.verdicts if verdict.code != Code.OFFLINE]
        self._codes.update(verdict.code for verdict in verdicts)
        self._reasons.update(v.reason.removeprefix(f"{v.node}: ") for v in verdicts if v.code != ADMITTED)
        if self._codes.keys() == {Code.ERROR}:
            reason, times = self._reasons.most_common(1)[0]
            raise ValueError(f"Every client failed; the most frequent error ({times} times): {reason}")


def _voting_metrics(rule: VotingRule, memory: Any, test: Proxy, budgets: list[int]) -> MetricRecord | None:
    """Return the accuracy of the elected classes, and the certified accuracy per budget; None without voters."""
    if memory.models is None:
        return None
    election = rule.vote(memory, test)
    accuracy = float((election.classes == test.labels).double().mean())
    certified = {f"certified-{budget}": certified_accuracy(election, test.labels, budget) for budget in budgets}
    return MetricRecord({"accuracy": accuracy, **certified})
