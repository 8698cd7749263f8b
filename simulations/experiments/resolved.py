"""Prepare an experiment once for all its runs: read data, draw clients, check the model and the training engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from corymb.client.device import choose_device
from corymb.server.rule_settings import RuleSettings
from corymb.simulations.data.examples import Source
from corymb.simulations.engine.factory import TrainerMaker, find_trainer
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.models import make_model
from corymb.simulations.experiments.scenario import Scenario, participation_of, scenario_of
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.strategies import Layout

Key = tuple[int, bool]  # a seed, and whether the hostile clients attack


@dataclass(frozen=True)
class Resolved:
    """What all runs of an experiment share.

    `scenarios` has the clients of each seed and, for rules with `attacked = false`, the same clients without hostile
    ones. `model()` returns a new module with this `layout`. `trainer` makes the trainer of an engine; it is None if
    the engine trains clients one by one.
    """

    experiment: Experiment
    source: Source
    scenarios: Mapping[Key, Scenario]
    model: Callable[[], nn.Module]
    layout: Layout
    device: torch.device
    trainer: TrainerMaker | None

    def key(self, rule: RuleSettings, seed: int) -> Key:
        """Return the key of the scenario that `rule` runs on with `seed`."""
        return seed, is_attacked(self.experiment, rule)

    def scenario(self, rule: RuleSettings, seed: int) -> Scenario:
        """Return the scenario that `rule` runs on with `seed`."""
        return self.scenarios[self.key(rule, seed)]

    @property
    def first(self) -> Scenario:
        """The scenario of the first rule and seed, which the plots show."""
        return self.scenario(self.experiment.rules[0], self.experiment.seeds[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of the data guessed, changed or dropped, and whether the data's sites are not used."""
        if self.source.train.sites is None or self.experiment.partition.kind == "site":
            return self.source.notes
        return (*self.source.notes, 'The data name sites; partition.kind = "site" gives each its own client.')

    def hostile_names(self, seed: int) -> set[str]:
        """Return the names of the hostile clients of `seed`; an empty set if no rule is attacked."""
        scenario = self.scenarios.get((seed, True))
        return set(scenario.hostile_names) if scenario else set()


def is_attacked(experiment: Experiment, rule: RuleSettings) -> bool:
    """Return whether `rule` runs with the hostile clients of the experiment; True if it has none."""
    return not (experiment.attack.clients and isinstance(rule, ExperimentRule) and not rule.attacked)


def resolve(experiment: Experiment) -> Resolved:
    """Read the data, draw the clients of each seed, and check the model, the devices and the training engine.

    Raises `ValueError` if any of these is missing, invalid or does not fit the others.
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
