"""The settings of a rule, with the components that act after it and what it needs at the clients."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from corymb.protocol.settings import Settings
from corymb.protocol.train_settings import CLIENT_METHODS, TrainSettings
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.strategies import Rule, ServerOptimizer, known_rules, make_rule
from corymb.strategies.core.registry import unknown
from corymb.strategies.rules import HINTS

LOCAL = "local"


class ServerOptimizerSettings(Settings):
    """The settings of a server optimiser; see `strategies.ServerOptimizer`."""

    optimizer: str = "SGD"
    """A class of `torch.optim`, or "Yogi"."""
    learning_rate: float = 1.0
    """The server's learning rate."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimiser, such as `momentum`."""

    def make(self) -> ServerOptimizer:
        """Return the server optimiser."""
        return ServerOptimizer(self.optimizer, self.learning_rate, self.options)


class RuleSettings(Settings):
    """A rule, and the components that act after it. In place of the table, a name alone selects a rule."""

    name: str
    """A rule that `corymb rules` lists, or "module:name"."""
    label: str = ""
    """Replaces the name in tables and plots."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the rule. A parameter that is itself a rule is a name, or a table with a name."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of `[train]` that differ under this rule."""
    server_optimizer: ServerOptimizerSettings | None = None
    """Applied to the rule's model."""
    candidate_election: list[str | dict[str, Any]] | None = None
    """Further rules, by name or as tables. In each round, the clients elect a model on their own data: the model of
    this rule, that of a listed rule, or the model before the round."""

    @model_validator(mode="after")
    def _check(self) -> RuleSettings:
        if ":" not in self.name and self.name not in (*known_rules(), *HINTS):
            raise ValueError(unknown("Unknown rule", self.name, [*known_rules(), *CLIENT_METHODS, LOCAL, "central"]))
        self.make()
        self.make_server_optimizer()
        self.make_election()
        return self

    def make(self) -> Rule[Any]:
        """Return the rule."""
        return make_rule(self.name, **self.parameters)

    def train_table(self) -> dict[str, Any]:
        """Return the settings of `[train]` that differ under this rule, with the algorithm that it needs at clients."""
        rule = self.make()
        if not rule.client_algorithm:
            return self.train
        return {"algorithm": rule.client_algorithm, "algorithm_options": rule.client_options(), **self.train}

    def train_under(self, train: TrainSettings) -> TrainSettings:
        """Return the settings of local training under this rule, where `train` are those of all rules."""
        table = self.train_table()
        if not table:
            return train
        base = train.model_dump(exclude_defaults=True)
        if table.keys() & {"epochs", "steps"}:  # these two exclude each other
            base = {key: value for key, value in base.items() if key not in ("epochs", "steps")}
        return TrainSettings(**{**base, **table})

    def make_server_optimizer(self) -> ServerOptimizer | None:
        """Return the server optimiser, or None."""
        return self.server_optimizer.make() if self.server_optimizer else None

    def make_election(self) -> CandidateElection | None:
        """Return the candidate election, or None."""
        if self.candidate_election is None:
            return None
        tables = [{"name": rule} if isinstance(rule, str) else dict(rule) for rule in self.candidate_election]
        return CandidateElection(tuple(make_rule(table.pop("name", ""), **table) for table in tables))

    @property
    def slug(self) -> str:
        """The title in a form that is safe for a folder's name."""
        return re.sub(r"[^A-Za-z0-9.=]+", "-", self.title)

    @property
    def title(self) -> str:
        """The name of the rule in tables and plots."""
        return self.label or self.name


def rule_tables(rules: Any) -> Any:
    """Convert a rule or a list of rules, each given by name or as a table, to a list of tables.

    The name of a client algorithm, such as "ditto", stands for FedAvg with this algorithm at the clients; the
    parameters are then the algorithm's. "local" is the baseline in which clients share nothing.
    """
    listed = rules if isinstance(rules, (list, tuple)) else [rules]
    return [_with_algorithm({"name": rule} if isinstance(rule, str) else rule) for rule in listed]


def _with_algorithm(table: Any) -> Any:
    if isinstance(table, dict) and table.get("name") == LOCAL:
        return {"label": LOCAL, **table, "name": "fedavg", "train": {"personal": ["*"], **table.get("train", {})}}
    if not isinstance(table, dict) or table.get("name") not in CLIENT_METHODS:
        return table
    name, options = table["name"], table.get("parameters", {})
    train = {"algorithm": name, **({"algorithm_options": options} if options else {}), **table.get("train", {})}
    return {"label": name, **table, "name": "fedavg", "parameters": {}, "train": train}
