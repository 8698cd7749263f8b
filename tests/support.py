"""Helpers that several tests share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import set_message_id, set_task_identity
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import resolve
from corymb.simulations.experiments.scenario import Scenario, scenario_of
from corymb.simulations.results.run import OnRound, Run, clients_of
from corymb.strategies import RULES, Model, Reply, Rule, make_rule
from corymb.strategies.core.rows import SingleRow

GOLDEN = Path(__file__).parent / "golden"
State = Mapping[str, Tensor]
REQUIRED_PARAMETERS: dict[str, dict[str, Any]] = {  # parameters without defaults
    "fedda": {"target": "site-00"},
    "fedgp": {"target": "site-00"},
    "layerwise": {"rule": "median"},
}
NEEDED = {"rate-sum": 0.3, "step-weight": 3.0}  # metrics without which some rules' doors reject a reply
RULES_WITHOUT_PROXY = {
    name: make_rule(name, **REQUIRED_PARAMETERS.get(name, {})) for name, kind in RULES.items() if not kind.needs_proxy
}


def golden(name: str) -> Any:
    """Load a file of reference values."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def vector(*numbers: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(numbers, dtype=torch.float64)


def after(rule: Rule[Any], origin: Tensor, replies: list[Reply], memory: Any = None, known: Any = ()) -> Tensor:
    """Return the parameters after one round of `rule`."""
    outcome = rule.aggregate(Model(origin), replies, rule.initial() if memory is None else memory, known)
    return outcome.model.parameters


def content(state: State, examples: Any = 1, **metrics: float) -> RecordDict:
    """Return the content of a client's reply to a training message."""
    record = MetricRecord({"num-examples": examples, **NEEDED, **metrics})
    return RecordDict({"arrays": to_arrays(state), "metrics": record})


def reply(node_id: int, records: RecordDict) -> Message:
    """Return a reply from `node_id`, with the content `records`, to a real message."""
    set_task_identity(run_id=1, node_id=1)
    request = Message(RecordDict(), node_id, "train")
    set_message_id(request, f"request-{node_id}")
    return Message(records, reply_to=request)


def run_rule(
    experiment: Experiment, rule: int, seed: int, folder: Path, on_round: OnRound | None = None, workers: int = 1
) -> None:
    """Run rule number `rule` of an experiment on this machine, with the journal in `folder`."""
    resolved = resolve(experiment)
    settings = experiment.rules[rule]
    with clients_of(resolved, resolved.key(settings, seed), workers) as clients:
        Run(resolved, settings, seed).run_locally(clients, folder, on_round)


def scenario_of_seed(experiment: Experiment, seed: int = 0) -> Scenario:
    """Return the scenario of `experiment` for `seed`."""
    return scenario_of(experiment, experiment.data.load(), seed)


def with_parts(reply: Reply, *parts: Tensor) -> Reply:
    """Return `reply` with another model, given as flat `parts`."""
    return replace(reply, rows=SingleRow(parts), row=0)
