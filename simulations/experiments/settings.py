"""The smaller tables of an experiment, each checked by itself."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from corymb.protocol.settings import Settings
from corymb.server.settings import RuleSettings


class ExperimentRule(RuleSettings):
    """A rule, as in a deployment. With `attacked = false` it runs with every client honest."""

    attacked: bool = True


class ModelSettings(Settings):
    """The model; `options` go to its factory. With `random_start` each client begins from a random model of its own."""

    kind: str = "softmax"
    options: dict[str, Any] = Field(default_factory=dict)
    random_start: bool = False


class ProxySettings(Settings):
    """The server's own data: `examples` of the test set, the same number of each class, which are not tested on."""

    examples: int = Field(0, ge=0)


class TargetSettings(Settings):
    """One more site, called "target": all that is tested is its kind of data, of which it has `examples`.

    Its inputs, and the test set's, get normal noise of deviation `noise`. `train` overrides its local training.
    """

    examples: int = Field(0, ge=0)
    noise: float = Field(0.0, ge=0)
    train: dict[str, Any] = Field(default_factory=dict)


class EvaluateSettings(Settings):
    """Test accuracy every so many rounds; the final one is the mean over the last `last` rounds.

    Rules that vote are also measured by the certified accuracy at each of `budgets` hostile voters.
    """

    every: int = Field(1, ge=1)
    last: int = Field(1, ge=1)
    budgets: list[int] = Field(default_factory=list)


class RaySettings(Settings):
    """What a client at work takes of Ray's resources, with `engine = "ray"`."""

    cpus: int = Field(1, ge=1)
    gpus: float = Field(0.0, ge=0)


class Claim(Settings):
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
