"""Prepare an experiment once for all its runs: read data, draw clients, check the model and the training engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import nn

from corymb.client.device import choose_device
from corymb.client.tasks.task import Task, make_task
from corymb.protocol.shared_state import fixed_names, personal_names
from corymb.server.rule_settings import RuleSettings
from corymb.simulations.data.examples import Source
from corymb.simulations.data.targets import outputs_of
from corymb.simulations.engine.channels_last import in_faster_layout
from corymb.simulations.engine.engine import obstacle
from corymb.simulations.engine.factory import TrainerMaker, find_trainer
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.models import make_model
from corymb.simulations.experiments.scenario import Scenario, participation_of, scenario_of
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
Key = tuple[int, bool, bool]  # a seed, whether the hostile clients attack, and whether the data are pooled


@dataclass(frozen=True)
class Resolved:
    """What all runs of an experiment share.

    `scenarios` has the clients of each seed; for rules with `attacked = false`, also without hostile ones, and for
    rules with `pooled`, also with one client that has all examples. `model()` returns a new module with this `layout`.
    `trainer` makes the trainer of an engine; it is None if the engine trains clients one by one. Those have modules of
    `model_alone()`, which differ from those of `model()` in their layout in memory at most.
    """

    experiment: Experiment
    source: Source
    scenarios: Mapping[Key, Scenario]
    model: Callable[[], nn.Module]
    layout: Layout
    device: torch.device
    task: Task
    trainer: TrainerMaker | None
    model_alone: Callable[[], nn.Module]

    def key(self, rule: RuleSettings, seed: int) -> Key:
        """Return the key of the scenario that `rule` runs on with `seed`."""
        return seed, is_attacked(self.experiment, rule), is_pooled(rule)

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
        scenario = self.scenarios.get((seed, True, False))
        return set(scenario.hostile_names) if scenario else set()


def is_attacked(experiment: Experiment, rule: RuleSettings) -> bool:
    """Return whether `rule` runs with the hostile clients of the experiment; True if it has none."""
    return not (experiment.attack.clients and isinstance(rule, ExperimentRule) and not rule.attacked)


def is_pooled(rule: RuleSettings) -> bool:
    """Return whether `rule` trains one client that has all examples."""
    return isinstance(rule, ExperimentRule) and rule.pooled


def resolve(experiment: Experiment, source: Source | None = None) -> Resolved:
    """Read the data, draw the clients of each seed, and check the model, the devices and the training engine.

    `source` stands in place of the experiment's own data.

    Raises `ValueError` if any of these is missing, invalid or does not fit the others.
    """
    source = source or experiment.data.load(experiment.task.kind)
    shape = tuple(source.train.inputs.shape[1:])
    parts = (source.train, source.test)
    outputs = max(outputs_of(part.targets, part.inputs, experiment.task) for part in parts)
    model = partial(make_model, experiment.model.kind, shape, outputs, **experiment.model.options)
    task = make_task(experiment.task)
    if task.metrics:
        import_module("sklearn.metrics")  # takes seconds, so before processes are forked
    with torch.random.fork_rng(devices=[]):
        module = model().eval()
    try:
        with torch.no_grad():
            task.loss(module(source.test.inputs_at(slice(0, 2))), source.test.targets[:2])
    except Exception as error:
        problem = str(error).removesuffix(".")
        raise ValueError(f"The model {experiment.model.kind!r} does not fit the data: {problem}.") from error
    for rule in experiment.rules:
        choose_device(experiment.train_for(rule).device)
    device = choose_device(experiment.train.device)
    kinds = sorted({(is_attacked(experiment, rule), is_pooled(rule)) for rule in experiment.rules})
    scenarios = {
        (seed, attacks, pooled): scenario_of(experiment if attacks else experiment.honest(), source, seed, pooled)
        for seed in experiment.seeds
        for attacks, pooled in kinds
    }
    for (seed, *_), scenario in scenarios.items():
        participation_of(experiment, scenario, seed)
    for rule in experiment.rules:
        _check_personal(rule, module, experiment)
    trainer = find_trainer(experiment.engine, model, source.train, device, task)
    for rule in experiment.rules if trainer is not None else ():
        if reason := obstacle(experiment.train_for(rule), device):
            log.warning("Under %r, clients train one by one because %s.", rule.title, reason)
    alone: Callable[[], nn.Module] = model
    if trainer is None and experiment.engine == "auto" and device.type == "cpu":
        alone = in_faster_layout(model, source.train, task)
    return Resolved(experiment, source, scenarios, model, trained_layout(module), device, task, trainer, alone)


def trained_layout(module: nn.Module) -> Layout:
    """Return the layout of all entries of a state dict but the parameters that are not trained."""
    fixed = fixed_names(module)
    layout = Layout.of_module(module)
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in fixed}
    return Layout.of(state, [entry.name for entry in layout.buffers])


def _check_personal(rule: ExperimentRule, module: nn.Module, experiment: Experiment) -> None:
    """Raise `ValueError` for a pattern that matches nothing, and if personal layers would never be tested."""
    if personal_names(module, experiment.train_for(rule)) and not experiment.evaluate.clients:
        raise ValueError(
            f"Under the rule {rule.title!r}, layers stay at the clients, so the server cannot test its model; set "
            "evaluate.clients = true."
        )
