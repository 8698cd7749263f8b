"""One run of an experiment: one rule on the clients of one seed, from the first model to the journal."""

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

from corymb.client import TrainSettings, evaluate, make_client_app
from corymb.client.batches import evaluation_batches
from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Journal, RoundRecord
from corymb.server.rounds.record import ADMITTED
from corymb.server.rounds.rejections import Code
from corymb.simulations.data.clients import Client
from corymb.simulations.data.examples import Examples
from corymb.simulations.data.random_start import with_random_start
from corymb.simulations.engine.cohort_app import CohortApp
from corymb.simulations.engine.factory import make_engine
from corymb.simulations.experiments.resolved import Key, Resolved
from corymb.simulations.experiments.scenario import TARGET, participation_of
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import Proxy, VotingRule
from corymb.strategies.voting.election import certified_accuracy

log = logging.getLogger("flwr.corymb")
OnRound = Callable[[RoundRecord], None]


@contextmanager
def clients_of(resolved: Resolved, key: Key, workers: int = 1) -> Iterator[Client]:
    """The clients of one scenario as one app, hostile ones among them; what trains them ends with the context.

    An engine may use `workers` processes.
    """
    experiment, scenario, (seed, attacks) = resolved.experiment, resolved.scenarios[key], key
    population = scenario.population.in_order()

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        mine = TensorDataset(*population.examples(int(context.node_config["partition-id"])))
        return mine, mine

    app: Client = make_client_app(resolved.model, data)
    engine = None
    if resolved.trainer is not None:
        layout = resolved.layout
        engine = make_engine(experiment.engine, resolved.trainer, population, layout, workers, resolved.device)
        app = CohortApp(engine, population, layout, app, experiment.blocks)
    if experiment.model.random_start:
        app = with_random_start(app, resolved.model, seed)
    if scenario.hostile and attacks:
        app = experiment.attack.around(app, scenario.hostile, seed)
    try:
        yield app
    finally:
        if engine is not None:
            engine.close()


class Run:
    """`rule` with `seed`. The partition, the participation and the first model depend on the seed only, so that all
    rules meet the same.
    """

    def __init__(self, resolved: Resolved, rule: ExperimentRule, seed: int) -> None:
        self._resolved, self._rule, self._seed = resolved, rule, seed
        self.scenario = resolved.scenario(rule, seed)
        self.participation, self._probabilities = participation_of(resolved.experiment, self.scenario, seed)
        self.settings = resolved.experiment.train_for(rule).model_copy(update={"seed": seed})

    def node_config(self, client: int) -> dict[str, Any]:
        """What a client's node config says besides its partition."""
        known = {} if self._probabilities is None else {"participation": float(self._probabilities[client])}
        experiment = self._resolved.experiment
        is_target = experiment.target.examples and self.scenario.names[client] == TARGET
        return known | (experiment.target_train().flat() if is_target else {})

    def on_this_machine(self, clients: Client, folder: Path, on_round: OnRound | None = None) -> None:
        """Run all rounds with `clients` in this process; the journal in `folder` is their record."""
        grid = LocalGrid(clients, self.scenario.names, run_config=self.settings.flat(), node_config=self.node_config)
        self.serve(with_availability(grid, self.participation), folder, on_round)

    def serve(self, grid: Grid, folder: Path, on_round: OnRound | None = None) -> None:
        """Run all rounds over `grid`. Test accuracy and loss are the server's metrics."""
        experiment, scenario = self._resolved.experiment, self.scenario
        torch.manual_seed(self._seed)
        module = self._resolved.model()
        rule = self._rule.make()
        tested = self._proxy(scenario.test) if isinstance(rule, VotingRule) else None

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round % experiment.evaluate.every and server_round != experiment.rounds:
                return None
            if tested is not None and isinstance(rule, VotingRule):
                return _vote(rule, strategy.state.memory, tested, experiment.evaluate.budgets)
            module.load_state_dict(to_state(arrays))
            test = TensorDataset(scenario.test.inputs, scenario.test.targets)
            metrics: dict[str, Any] = evaluate(module, evaluation_batches(test), TrainSettings())
            del metrics["seconds"]
            return MetricRecord(metrics)

        def look(record: RoundRecord) -> None:
            watched.look(record)
            if on_round is not None:
                on_round(record)

        watched = _Watched()
        with closing(Journal(folder, durable=False)) as journal:
            strategy = FlowerStrategy(
                rule,
                server_optimizer=self._rule.make_server_optimizer(),
                candidate_election=self._rule.make_election(),
                proxy=self._proxy(scenario.proxy) if scenario.proxy else None,
                fraction_train=experiment.fraction,
                fraction_evaluate=0,
                min_available_nodes=1,
                seed=self._seed,
                journal=journal,
                on_round=look,
                buffers=[entry.name for entry in self._resolved.layout.buffers],
            )
            initial = to_arrays({name: tensor.clone() for name, tensor in module.state_dict().items()})
            # Clients run while their replies are pulled: no clock may decide who counts.
            strategy.start(grid, initial, experiment.rounds, timeout=inf, evaluate_fn=evaluate_fn)
        watched.end()

    def _proxy(self, examples: Examples) -> Proxy:
        with torch.random.fork_rng(devices=[]):
            return Proxy(self._resolved.model().eval(), examples.inputs, examples.targets)


class _Watched:
    """Ends a run in which nothing but errors comes from the clients: at once, not after the last round."""

    def __init__(self) -> None:
        self._codes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def look(self, record: RoundRecord) -> None:
        """Raise `ValueError` when clients were asked and every one that could be reached failed."""
        came = [verdict for verdict in record.verdicts if verdict.code != Code.OFFLINE]
        self._codes.update(verdict.code for verdict in came)
        self._reasons.update(v.reason.removeprefix(f"{v.node}: ") for v in came if v.code != ADMITTED)
        if self._codes.keys() == {Code.ERROR}:
            reason, times = self._reasons.most_common(1)[0]
            raise ValueError(f"Every client failed, {times} times with: {reason}")

    def end(self) -> None:
        """Warn when nothing has been learnt, as a table of results would not show it."""
        if self._reasons and ADMITTED not in self._codes:
            reason, times = self._reasons.most_common(1)[0]
            log.warning("Not one reply was admitted, so the model is the one at the start; %d times: %s", times, reason)


def _vote(rule: VotingRule, memory: Any, tested: Proxy, budgets: list[int]) -> MetricRecord | None:
    """The accuracy of what the voters elect, plain and certified."""
    if memory.models is None:
        return None
    election = rule.vote(memory, tested)
    accuracy = float((election.classes == tested.labels).double().mean())
    certified = {f"certified-{budget}": certified_accuracy(election, tested.labels, budget) for budget in budgets}
    return MetricRecord({"accuracy": accuracy, **certified})
