"""An experiment resolved once: its data read, its clients drawn for each seed, its model tried, its engine proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from corymb.client.device import choose_device
from corymb.server.settings import RuleSettings
from corymb.simulations.data.examples import Source
from corymb.simulations.engine.factory import TrainerMaker, find_trainer
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.models import make_model
from corymb.simulations.experiments.scenario import Scenario, participation_of, scenario_of
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.strategies import Layout

Key = tuple[int, bool]  # a seed, and whether its hostile clients attack


@dataclass(frozen=True)
class Resolved:
    """What all runs of an experiment share, made once.

    `scenarios` are the clients of each seed, and of each seed with every client honest where a rule asks for that.
    `model()` makes a new module of this `layout`; `trainer` makes what trains clients together, None for nothing.
    """

    experiment: Experiment
    source: Source
    scenarios: Mapping[Key, Scenario]
    model: Callable[[], nn.Module]
    layout: Layout
    device: torch.device
    trainer: TrainerMaker | None

    def key(self, rule: RuleSettings, seed: int) -> Key:
        """Which scenario `rule` meets."""
        return seed, is_attacked(self.experiment, rule)

    def scenario(self, rule: RuleSettings, seed: int) -> Scenario:
        """The clients that `rule` meets with `seed`."""
        return self.scenarios[self.key(rule, seed)]

    @property
    def first(self) -> Scenario:
        """The clients of the first seed, which pictures show."""
        return self.scenario(self.experiment.rules[0], self.experiment.seeds[0])

    def hostile_names(self, seed: int) -> set[str]:
        """The names of the hostile clients of `seed`; nobody's where no rule is attacked."""
        scenario = self.scenarios.get((seed, True))
        return set(scenario.hostile_names) if scenario else set()


def is_attacked(experiment: Experiment, rule: RuleSettings) -> bool:
    """Whether the clients that `rule` meets attack, if the experiment has hostile ones."""
    return not (experiment.attack.clients and isinstance(rule, ExperimentRule) and not rule.attacked)


def resolve(experiment: Experiment) -> Resolved:
    """Read, draw, try and prove everything that the runs of `experiment` need.

    Raises `ValueError` for data, clients, participation, a model or a device that cannot be.
    """
    source = experiment.data.load()
    shape = tuple(source.train.inputs.shape[1:])
    model = partial(make_model, experiment.model.kind, shape, source.classes, **experiment.model.options)
    with torch.random.fork_rng(devices=[]):
        module = model().eval()
    try:
        with torch.no_grad():
            nn.functional.cross_entropy(module(source.test.inputs[:2]), torch.zeros(2).long())
    except Exception as error:
        raise ValueError(f"The model {experiment.model.kind!r} does not fit the data: {error}.") from error
    for rule in experiment.rules:
        choose_device(experiment.train_for(rule).device)
    device = choose_device(experiment.train.device)
    attacked = sorted({is_attacked(experiment, rule) for rule in experiment.rules})
    scenarios = {
        (seed, attacks): scenario_of(experiment if attacks else experiment.honest(), source, seed)
        for seed in experiment.seeds
        for attacks in attacked
    }
    for (seed, _), scenario in scenarios.items():
        participation_of(experiment, scenario, seed)
    trainer = find_trainer(experiment.engine, model, source.train, device)
    return Resolved(experiment, source, scenarios, model, Layout.of_module(module), device, trainer)
