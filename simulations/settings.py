"""The tables of an experiment, each checked by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from corymb.server import Guard
from corymb.strategies import Rule, Step, make_rule


class Strict(BaseModel):
    """A table of settings: a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Strict):
    """What to learn from; see `data.load`. `examples` are drawn to train on, by the seed; default: all."""

    source: str = "digits"
    label: str | None = None
    positive_above: float | None = None
    test_fraction: float = Field(0.2, gt=0, lt=1)
    examples: int | None = Field(None, ge=1)
    mean: float = 0.0
    deviation: float = Field(1.0, gt=0)


class PartitionSettings(Strict):
    """How the examples are spread over clients; "site" takes the data's own sites, and their number.

    Under "drawn" each client draws about `examples` from all, lognormal with `sigma`; other kinds deal them out once.
    """

    kind: Literal["dirichlet", "shards", "iid", "site", "drawn"] = "dirichlet"
    clients: int = Field(10, ge=1)
    alpha: float = Field(0.1, gt=0)
    shards_per_client: int = Field(2, ge=1)
    examples: int = Field(100, ge=1)
    sigma: float = Field(0.0, ge=0)


class ParticipationSettings(Strict):
    """Who is online when; without `probability` it follows from each client's classes."""

    kind: Literal["always", "bernoulli", "markov", "cyclic", "trace"] = "always"
    probability: float | None = Field(None, gt=0, le=1)
    mean: float = Field(0.1, gt=0, le=1)
    minimum: float = Field(0.02, gt=0, le=1)
    alpha: float = Field(0.1, gt=0)
    rate: float = Field(0.05, gt=0, le=1)
    cycle: int = Field(100, ge=2)
    path: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> ParticipationSettings:
        if (self.kind == "trace") != (self.path is not None):
            raise ValueError("the kind 'trace' and a path go together")
        return self


class ModelSettings(Strict):
    """The model; `options` go to its factory. With `own_start` each client begins from a random one of its own."""

    kind: str = "softmax"
    options: dict[str, Any] = {}
    own_start: bool = False


class ProxySettings(Strict):
    """The server's own data: `examples` of the test set, the same number of each class, which are not tested on."""

    examples: int = Field(0, ge=0)


class AttackSettings(Strict):
    """What the hostile `clients`, drawn by the seed, do; see `attacks`. "labels" shuffles their examples' labels."""

    kind: Literal["labels", "noise", "opposite", "reversed"] = "labels"
    clients: int = Field(0, ge=0)
    scale: float = Field(1.0, gt=0)


class TargetSettings(Strict):
    """One more site, called "target": all that is tested is its kind of data, of which it has `examples`.

    Its inputs, and the test set's, get normal noise of deviation `noise`. `train` overrides its local training.
    """

    examples: int = Field(0, ge=0)
    noise: float = Field(0.0, ge=0)
    train: dict[str, Any] = {}


class StepSettings(Strict):
    """A server optimiser; see `strategies.Step`."""

    optimizer: str = "SGD"
    learning_rate: float = 1.0
    options: dict[str, Any] = {}

    def make(self) -> Step:
        """The step."""
        return Step(self.optimizer, self.learning_rate, self.options)


class RuleSettings(Strict):
    """A rule with its parameters; `label` tells it from others, `train` overrides local training for it.

    `step` is a server optimiser after it, `guard` lists rules whose models are candidates beside its own and the model
    before the round, elected by the clients on their training data; `attacked = false` runs it with everybody honest.
    """

    name: str
    label: str = ""
    parameters: dict[str, Any] = {}
    train: dict[str, Any] = {}
    step: StepSettings | None = None
    guard: list[str | dict[str, Any]] | None = None
    attacked: bool = True

    @model_validator(mode="after")
    def _check(self) -> RuleSettings:
        self.make()
        if self.step is not None:
            self.step.make()
        self.make_guard()
        return self

    def make_guard(self) -> Guard | None:
        """The guard, if there is one."""
        if self.guard is None:
            return None
        tables = [{"name": rule} if isinstance(rule, str) else dict(rule) for rule in self.guard]
        return Guard(tuple(make_rule(table.pop("name", ""), **table) for table in tables))

    def make(self) -> Rule[Any]:
        """The rule."""
        return make_rule(self.name, **self.parameters)

    @property
    def slug(self) -> str:
        """What its folder is called."""
        return re.sub(r"[^A-Za-z0-9.=]+", "-", self.title)

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return self.label or self.name


class EvaluateSettings(Strict):
    """Test accuracy every so many rounds; the final one is the mean over the last `last` rounds.

    Rules that elect are also measured by the certified accuracy at each of `budgets` hostile voters.
    """

    every: int = Field(1, ge=1)
    last: int = Field(1, ge=1)
    budgets: list[int] = []


class RaySettings(Strict):
    """What a client at work takes of Ray's resources, with `engine = "ray"`."""

    cpus: int = Field(1, ge=1)
    gpus: float = Field(0.0, ge=0)


class Claim(Strict):
    """What a paper says of this setting, and what would have to be measured for it to hold.

    The `measure` of `rule`, less that of `than` where given, lies between `least` and `most`. A measure is
    "accuracy", in points of percent like its differences; "hostile", the mean share of weight that hostile clients
    get; "seconds"; or a number from the rounds' records, like "gamma" or "certified-10".
    """

    paper: str
    rule: str
    than: str | None = None
    measure: str = "accuracy"
    least: float | None = None
    most: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if self.least is None and self.most is None:
            raise ValueError("a claim needs least, most, or both")
        return self
