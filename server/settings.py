"""The tables that an experiment and a deployment share, and those of the ready ServerApp."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from corymb.protocol.run_config import nest
from corymb.protocol.settings import Settings, problems
from corymb.protocol.train_settings import TrainSettings
from corymb.server.rounds.backup_workers import DynamicBackupWorkers
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.server.rounds.round_size import RoundSize, WaitForShare
from corymb.strategies import Rule, ServerOptimizer, make_rule

log = logging.getLogger("flwr.corymb")


class ServerOptimizerSettings(Settings):
    """A server optimiser; see `strategies.ServerOptimizer`."""

    optimizer: str = "SGD"
    learning_rate: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)

    def make(self) -> ServerOptimizer:
        """The server optimiser."""
        return ServerOptimizer(self.optimizer, self.learning_rate, self.options)


class RuleSettings(Settings):
    """A rule with its `parameters`, or its name alone; `label` is what tables call it.

    `train` overrides local training under it. `server_optimizer` acts after the rule. `candidate_election` lists rules
    whose models are candidates beside its own and the model before the round, elected by the sites on data of theirs.
    """

    name: str
    label: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    server_optimizer: ServerOptimizerSettings | None = None
    candidate_election: list[str | dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check(self) -> RuleSettings:
        self.make()
        self.make_server_optimizer()
        self.make_election()
        return self

    def make(self) -> Rule[Any]:
        """The rule."""
        return make_rule(self.name, **self.parameters)

    def make_server_optimizer(self) -> ServerOptimizer | None:
        """The server optimiser, if there is one."""
        return self.server_optimizer.make() if self.server_optimizer else None

    def make_election(self) -> CandidateElection | None:
        """The election, if there is one."""
        if self.candidate_election is None:
            return None
        tables = [{"name": rule} if isinstance(rule, str) else dict(rule) for rule in self.candidate_election]
        return CandidateElection(tuple(make_rule(table.pop("name", ""), **table) for table in tables))

    @property
    def slug(self) -> str:
        """What its folder is called."""
        return re.sub(r"[^A-Za-z0-9.=]+", "-", self.title)

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return self.label or self.name


def rule_tables(rules: Any) -> Any:
    """Rules as a list of tables, from names, tables, or a list of either."""
    listed = rules if isinstance(rules, (list, tuple)) else [rules]
    return [{"name": rule} if isinstance(rule, str) else rule for rule in listed]


class ShareSettings(Settings):
    """A round waits for a fixed share of the sites that were asked."""

    kind: Literal["share"]
    share: float = Field(0.9, gt=0, le=1)

    def make(self) -> RoundSize[Any]:
        """The policy."""
        return WaitForShare(self.share)


class BackupWorkersSettings(Settings):
    """A round waits for as many replies as lower the loss most per second; see `DynamicBackupWorkers`."""

    kind: Literal["backup_workers"]
    rate: float = Field(gt=0)
    window: int = Field(5, ge=1)

    def make(self) -> RoundSize[Any]:
        """The policy."""
        return DynamicBackupWorkers(self.rate, self.window)


class ModelSettings(Settings):
    """`kind` is "module:function", which is called with `options` and returns a `torch.nn.Module`."""

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)


class ProxySettings(Settings):
    """`data` is "module:function", which returns the server's own inputs and targets."""

    data: str


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class ServerSettings(Settings):
    """The run config of `corymb.server.app:app`, as the tables that it describes. Times are in seconds.

    `timeout` bounds the wait for replies in each phase of a round; `wait_seconds` the wait for nodes before it.
    """

    model: Annotated[ModelSettings, BeforeValidator(_kind)]
    rules: Annotated[tuple[RuleSettings], BeforeValidator(rule_tables)] = (RuleSettings(name="fedavg"),)
    train: TrainSettings = TrainSettings()
    rounds: int = Field(3, ge=1)
    fraction: float = Field(1.0, gt=0, le=1)
    fraction_evaluate: float = Field(1.0, ge=0, le=1)
    min_available_nodes: int = Field(2, ge=1)
    wait_seconds: float = Field(3600.0, gt=0)
    timeout: float = Field(3600.0, gt=0)
    round_size: Annotated[ShareSettings | BackupWorkersSettings, Field(discriminator="kind")] | None = None
    proxy: ProxySettings | None = None
    seed: int = 0
    journal: str = ""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ServerSettings:
        """From a run config. Raises `ValueError` naming everything that is wrong.

        A key at the top that is none of these is the app's own, unless it is nearly one of these.
        """
        tables = nest(config)
        known = list(cls.model_fields)
        others = sorted(tables.keys() - set(known))
        for key in others:
            if near := get_close_matches(key, known, 1, cutoff=0.75):
                raise ValueError(f"The run config has a key {key!r}, which is unknown; did you mean {near[0]!r}?")
        if others:
            log.info("The run config has keys that the server does not read: %s", ", ".join(others))
        try:
            return cls(**{key: value for key, value in tables.items() if key in known})
        except ValidationError as error:
            raise ValueError(f"The run config is wrong: {problems(error, cls)}.") from None
