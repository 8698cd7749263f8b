"""One run of an experiment: one rule on the clients of one seed, from the initial model to the journal."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, make_client_app
from corymb.client.algorithms.memory_files import PLACE, forget_after
from corymb.client.local_work import algorithm_of
from corymb.protocol.codec import to_arrays
from corymb.protocol.shared_state import shared_state
from corymb.server import FlowerStrategy, Journal, RoundRecord
from corymb.server.rounds.codes import ADMITTED
from corymb.server.rounds.rejections import Code
from corymb.server.rounds.round_size import WaitForShare
from corymb.server.rounds.staleness import Asynchrony
from corymb.simulations.data.clients import Client
from corymb.simulations.data.random_start import with_random_start
from corymb.simulations.engine.cohort_app import CohortApp
from corymb.simulations.engine.engine import obstacle
from corymb.simulations.engine.factory import make_engine
from corymb.simulations.engine.kept import with_vectors_in_full
from corymb.simulations.experiments.resolved import Key, Resolved
from corymb.simulations.experiments.scenario import TARGET, participation_of
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.grid.virtual_time import VirtualTimeGrid
from corymb.simulations.results.model_tests import ModelTests, proxy_of
from corymb.simulations.results.score import VIRTUAL

log = logging.getLogger("flwr.corymb")
OnRound = Callable[[RoundRecord], None]


@contextmanager
def clients_of(resolved: Resolved, key: Key, workers: int = 1, together: bool = True) -> Iterator[Client]:
    """Yield the client app of one scenario, with its hostile clients; the training engine closes with the context.

    The engine may use up to `workers` processes. Without `together` there is no engine, and clients train one by one.
    """
    experiment, scenario, (seed, attacks, _) = resolved.experiment, resolved.scenarios[key], key
    population = scenario.population.in_order()

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        examples = TensorDataset(*population.examples(int(context.node_config["partition-id"])))
        return examples, examples

    layout = resolved.layout
    app = with_vectors_in_full(make_client_app(resolved.model_alone, data), population, layout)
    engine = None
    if resolved.trainer is not None and together:
        engine = make_engine(experiment.engine, resolved.trainer, population, layout, workers, resolved.device, seed)
        app = CohortApp(engine, population, layout, app, experiment.blocks, resolved.model)
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

    @property
    def obstacle(self) -> str | None:
        """Why the clients cannot train together, or None."""
        return obstacle(self.settings, self._resolved.device)

    def config(self, folder: Path) -> dict[str, Any]:
        """Return the run config of the clients; `folder` is that of the journal, where they keep what they need."""
        task = self._resolved.experiment.task.flat()
        return {**self.settings.flat(), **task, PLACE: str((folder / "clients").resolve())}

    def node_config(self, row: int) -> dict[str, Any]:
        """Return entries of the node config of the training client number `row`."""
        client = self.scenario.training[row]
        config: dict[str, Any] = {} if client == row else {"partition-id": client}
        if self._probabilities is not None:
            config["participation"] = float(self._probabilities[row])
        experiment = self._resolved.experiment
        is_target = experiment.target.examples and self.scenario.names[client] == TARGET
        return config | (experiment.target_train().flat() if is_target else {})

    def run_locally(self, clients: Client, folder: Path, on_round: OnRound | None = None, workers: int = 1) -> None:
        """Run all rounds with `clients` on a `LocalGrid` with this many `workers`; write the journal to `folder`."""
        grid = LocalGrid(
            clients, self.scenario.training_names, run_config=self.config(folder), workers=workers,
            node_config=self.node_config,
        )  # fmt: skip
        with closing(grid):
            self.serve(grid, folder, on_round, workers)

    def serve(self, grid: Grid, folder: Path, on_round: OnRound | None = None, threads: int = 1) -> None:
        """Run the rounds that are not yet in the journal in `folder`, over the nodes of `grid` that are online.

        Writes the journal and calls `on_round` after each round.
        The server's metrics are those of the tests, in `threads` threads or processes.
        """
        experiment, scenario = self._resolved.experiment, self.scenario
        devices, timed = experiment.devices_for(self._rule), grid
        torch.manual_seed(self._seed)
        module = self._resolved.model()
        rule = self._rule.make()
        config = self.config(folder)
        tests = ModelTests(self._resolved, scenario, rule, module, self.settings, config, threads)

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if isinstance(timed, VirtualTimeGrid):
                notes = {**strategy.record.notes, VIRTUAL: timed.now}
                strategy.record = replace(strategy.record, notes=notes)
            measured = tests.measure(server_round, arrays, strategy.state.memory)
            if measured is None:
                return None
            metrics, verdicts = measured
            strategy.record = replace(strategy.record, evaluations=verdicts)
            return MetricRecord(dict(metrics))

        def after_round(record: RoundRecord) -> None:
            failures.check(record)
            if on_round is not None:
                on_round(record)

        failures, shared = _FailureCheck(), shared_state(module, self.settings)
        with closing(tests), closing(Journal(folder, durable=False)) as journal:
            strategy = FlowerStrategy(
                rule,
                server_optimizer=self._rule.make_server_optimizer(),
                candidate_election=self._rule.make_election(),
                proxy=proxy_of(self._resolved, scenario.proxy) if scenario.proxy else None,
                fraction_train=experiment.fraction,
                fraction_evaluate=0,
                min_train_nodes=1,
                min_available_nodes=1,
                seed=self._seed,
                journal=journal,
                resume=True,  # a run that begins anew has an empty folder
                on_round=after_round,
                buffers=[entry.name for entry in self._resolved.layout.buffers],
                shares_nothing=not shared,
                drift=experiment.evaluate.drift,
                round_size=WaitForShare(devices.wait_for) if devices.wait_for < 1 else None,
                asynchrony=self._asynchrony(),
            )
            initial = to_arrays({name: tensor.clone() for name, tensor in shared.items()})
            # Clients run while their replies are pulled, so a timeout would make results depend on the machine.
            finished = journal.last_whole_round()
            forget_after(Path(str(config[PLACE])), finished)
            timed = self._timed(grid)
            online = timed if devices.buffer else with_availability(timed, self.participation, finished)
            strategy.start(online, initial, experiment.rounds, timeout=inf, evaluate_fn=evaluate_fn)

    def _timed(self, grid: Grid) -> Grid:
        """Return `grid` in virtual time, if the experiment has devices."""
        settings = self._resolved.experiment.devices_for(self._rule)
        if not settings.is_timed:
            return grid
        devices = settings.make(len(self.scenario.training), np.random.default_rng([self._seed, 8]))
        return VirtualTimeGrid(grid, devices, self._examples, settings.deadline, self._seed)

    def _examples(self, row: int) -> int:
        """Return how many examples the training client number `row` trains on in a round, repetitions included."""
        settings = TrainSettings.read(self.settings.flat(), self.node_config(row))
        size = self.scenario.population.size(self.scenario.training[row])
        return algorithm_of(settings).examples_trained(settings, size)

    def _asynchrony(self) -> Asynchrony | None:
        experiment = self._resolved.experiment
        settings = experiment.devices_for(self._rule)
        if not settings.buffer:
            return None
        concurrency = settings.concurrency or max(1, round(experiment.fraction * len(self.scenario.training)))
        return Asynchrony(settings.buffer, concurrency, settings.staleness, settings.max_staleness)


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
