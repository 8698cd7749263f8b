"""One run of an experiment: one rule, one seed, from data to journal."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import TrainSettings, evaluate, make_client_app
from corymb.client.batches import evaluation_batches
from corymb.client.device import choose_device
from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Journal, RoundRecord
from corymb.server.door import Code
from corymb.simulations.attacks import Attackers
from corymb.simulations.data import Examples
from corymb.simulations.engine.app import CohortApp
from corymb.simulations.engine.engine import Engine
from corymb.simulations.engine.making import make_engine
from corymb.simulations.experiment import Experiment
from corymb.simulations.flower.simulation import require_ray, simulate
from corymb.simulations.grid import LocalGrid
from corymb.simulations.models import make_model
from corymb.simulations.own_start import OwnStart
from corymb.simulations.participation import (
    Always,
    Bernoulli,
    Cyclic,
    Markov,
    Participation,
    Trace,
    class_correlated,
)
from corymb.simulations.scenario import TARGET, Scenario, scenario_of, source_of
from corymb.simulations.settings import AttackSettings, ParticipationSettings, RuleSettings
from corymb.strategies import ElectingRule, Layout, Proxy
from corymb.strategies.election import certified_accuracy

log = logging.getLogger("flwr.corymb")


def participation_of(
    settings: ParticipationSettings, scenario: Scenario, seed: int
) -> tuple[Participation, NDArray[np.float64] | None]:
    """The process, and each client's probability of being online `[N]` where it has one."""
    clients = len(scenario.names)
    rng = np.random.default_rng([seed, 2])
    if settings.kind == "always":
        return Always(clients), None
    if settings.kind == "trace":
        return Trace(settings.path or Path(), clients), None
    if settings.probability is not None:
        probabilities = np.full(clients, settings.probability)
    else:
        probabilities = class_correlated(scenario.labels, rng, settings.alpha, settings.mean, settings.minimum)
    if settings.kind == "bernoulli":
        return Bernoulli(probabilities, rng), probabilities
    if settings.kind == "markov":
        return Markov(probabilities, rng, settings.rate), probabilities
    return Cyclic(probabilities, rng, settings.cycle), probabilities


def model_of(experiment: Experiment) -> nn.Module:
    """A new model for the experiment's data."""
    source = source_of(experiment.data)
    shape = tuple(source.train.inputs.shape[1:])
    return make_model(experiment.model.kind, shape, source.classes, **experiment.model.options)


def check(experiment: Experiment) -> None:
    """Raise `ValueError` for data, clients, participation, a model or a device that cannot be, before any run."""
    if experiment.engine == "ray":
        require_ray()
    module = model_of(experiment).eval()
    try:
        with torch.no_grad():
            nn.functional.cross_entropy(module(source_of(experiment.data).test.inputs[:2]), torch.zeros(2).long())
    except Exception as error:
        raise ValueError(f"The model {experiment.model.kind!r} does not fit the data: {error}.") from error
    for rule in experiment.rules:
        choose_device(experiment.train_for(rule).device)
    for seed in experiment.seeds:
        scenario = scenario_of(experiment, seed)
        participation_of(experiment.participation, scenario, seed)
    _, engine = _client_app(experiment, scenario, 0, workers=1)  # which refuses a model that it cannot train
    if engine is not None:
        engine.close()


class Federation:
    """One rule of an experiment with one seed: its clients, and the server that they have.

    The data's partition, the participation and the initial model depend on the seed only, so that
    all rules meet the same.
    """

    def __init__(self, experiment: Experiment, rule: RuleSettings, seed: int) -> None:
        if not rule.attacked:
            experiment = experiment.model_copy(update={"attack": AttackSettings()})
        self._experiment, self._rule, self._seed = experiment, rule, seed
        self.scenario = scenario_of(experiment, seed)
        self.participation, self._probabilities = participation_of(experiment.participation, self.scenario, seed)
        self.settings = experiment.train_for(rule).model_copy(update={"seed": seed})

    def node_config(self, client: int) -> dict[str, Any]:
        """What a client's node config says besides its partition."""
        known = {} if self._probabilities is None else {"participation": float(self._probabilities[client])}
        target = self._experiment.target.examples and self.scenario.names[client] == TARGET
        return known | (self._experiment.target_train().flat() if target else {})

    def clients(self, workers: int = 1) -> tuple[Any, Engine | None]:
        """The clients as one app, hostile ones among them, and the engine that trains them, if it is not the app."""
        return _client_app(self._experiment, self.scenario, self._seed, workers)

    def serve(self, grid: Grid, folder: Path, on_round: Callable[[RoundRecord], None] | None = None) -> None:
        """Run all rounds; the journal in `folder` is their record. Test accuracy and loss are the server's metrics."""
        experiment, scenario = self._experiment, self.scenario
        torch.manual_seed(self._seed)
        module = model_of(experiment)
        rule = self._rule.make()
        tested = _proxy(experiment, scenario.test) if isinstance(rule, ElectingRule) else None

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round % experiment.evaluate.every and server_round != experiment.rounds:
                return None
            if tested is not None and isinstance(rule, ElectingRule):
                return _elected(rule, strategy.memory, tested, experiment.evaluate.budgets)
            module.load_state_dict(to_state(arrays))
            test = TensorDataset(scenario.test.inputs, scenario.test.targets)
            metrics: dict[str, Any] = evaluate(module, evaluation_batches(test), TrainSettings())
            del metrics["seconds"]
            return MetricRecord(metrics)

        def watch(record: RoundRecord) -> None:
            watched.look(record)
            if on_round is not None:
                on_round(record)

        watched = _Watched()
        with closing(Journal(folder, durable=False)) as journal:
            strategy = FlowerStrategy(
                rule,
                step=self._rule.step.make() if self._rule.step else None,
                guard=self._rule.make_guard(),
                proxy=_proxy(experiment, scenario.proxy) if scenario.proxy else None,
                fraction_train=experiment.fraction,
                fraction_evaluate=0,
                min_available_nodes=1,
                seed=self._seed,
                journal=journal,
                on_round=watch,
                buffers=[entry.name for entry in Layout.of_module(module).buffers],
            )
            initial = to_arrays({name: tensor.clone() for name, tensor in module.state_dict().items()})
            # Clients run while their replies are pulled: no clock may decide who counts.
            strategy.start(grid, initial, experiment.rounds, timeout=inf, evaluate_fn=evaluate_fn)
        watched.end()


class _Watched:
    """Ends a run in which nothing but errors comes from the clients: at once, not after the last round."""

    def __init__(self) -> None:
        self._codes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def look(self, record: RoundRecord) -> None:
        """Raise `ValueError` when clients were asked and every one that could be reached failed."""
        came = [verdict for verdict in record.verdicts if verdict.code != Code.OFFLINE]
        self._codes.update(verdict.code for verdict in came)
        self._reasons.update(v.reason.removeprefix(f"{v.node}: ") for v in came if v.code != "admitted")
        if self._codes.keys() == {Code.ERROR}:
            reason, times = self._reasons.most_common(1)[0]
            raise ValueError(f"Every client failed, {times} times with: {reason}")

    def end(self) -> None:
        """Warn when nothing has been learnt, as a table of results would not show it."""
        if self._reasons and "admitted" not in self._codes:
            reason, times = self._reasons.most_common(1)[0]
            log.warning("Not one reply was admitted, so the model is the one at the start; %d times: %s", times, reason)


def run(
    experiment: Experiment,
    rule: RuleSettings,
    seed: int,
    folder: Path,
    on_round: Callable[[RoundRecord], None] | None = None,
    workers: int = 1,
) -> None:
    """Run `rule` with `seed`; the journal in `folder` is its record. Engines may use `workers` processes."""
    if experiment.engine == "ray":
        simulate(experiment, experiment.rules.index(rule), seed, folder, on_round)
        return
    federation = Federation(experiment, rule, seed)
    clients, engine = federation.clients(workers)
    grid = LocalGrid(
        clients,
        federation.scenario.names,
        run_config=federation.settings.flat(),
        participation=federation.participation,
        node_config=federation.node_config,
    )

    try:
        federation.serve(grid, folder, on_round)
    finally:
        if engine is not None:
            engine.close()


def _client_app(experiment: Experiment, scenario: Scenario, seed: int, workers: int) -> tuple[Any, Engine | None]:
    """The clients as one app, hostile ones among them, and the engine that trains them, if it is not the app."""
    make = partial(model_of, experiment)
    population = scenario.population.in_order()

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        mine = TensorDataset(*population.examples(int(context.node_config["partition-id"])))
        return mine, mine

    app: Any = make_client_app(make, data)
    with torch.random.fork_rng(devices=[]):
        layout = Layout.of_module(make())
    device = choose_device(experiment.train.device)
    engine = make_engine(experiment.engine, make, population, layout, workers, device)
    if engine is not None:
        app = CohortApp(engine, population, layout, app, experiment.blocks)
    if experiment.model.own_start:
        app = OwnStart(app, make, seed)
    if scenario.hostile and experiment.attack.kind != "labels":
        app = Attackers(app, experiment.attack.kind, scenario.hostile, experiment.attack.scale, seed)
    return app, engine


def _proxy(experiment: Experiment, examples: Examples) -> Proxy:
    return Proxy(model_of(experiment).eval(), examples.inputs, examples.targets)


def _elected(rule: ElectingRule, memory: Any, tested: Proxy, budgets: list[int]) -> MetricRecord | None:
    """The accuracy of what the voters elect, plain and certified."""
    if memory.models is None:
        return None
    election = rule.vote(memory, tested)
    accuracy = float((election.classes == tested.labels).double().mean())
    certified = {f"certified-{budget}": certified_accuracy(election, tested.labels, budget) for budget in budgets}
    return MetricRecord({"accuracy": accuracy, **certified})
