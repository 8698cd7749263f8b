"""The smaller settings tables of an experiment."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from corymb.protocol.settings import Settings
from corymb.server.rule_settings import RuleSettings, rule_tables


class ExperimentRule(RuleSettings):
    """A rule, and the components that act after it. In place of the table, a name alone selects a rule."""

    attacked: bool = True
    """False runs the rule without hostile clients."""
    devices: dict[str, Any] = Field(default_factory=dict)
    """Settings of `[devices]` that differ under this rule."""
    pooled: bool = False
    """True trains one client that has the examples of all. The rule name "central" sets it."""


class ModelSettings(Settings):
    """The model."""

    kind: str = "softmax"
    """"softmax", "mlp", "cnn", or "module:factory". The factory is called with `(shape, classes, **options)` and
    returns a `torch.nn.Module`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the factory: `hidden`, `depth` and `batch_norm` of "mlp", `hidden` and `channels` of "cnn"."""
    random_start: bool = False
    """Each client starts from its own random model in the first round."""


class ProxySettings(Settings):
    """The server's own data, for rules that need proxy data."""

    examples: int = Field(0, ge=0)
    """The number of examples, taken from the test set with equal classes; they are not tested on."""


class TargetSettings(Settings):
    """An additional client called "target". The test set becomes its kind of data."""

    examples: int = Field(0, ge=0)
    """Training examples of the target; 0 means that there is no such client."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of the Gaussian noise that is added to the target's inputs and to the test set's."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Settings of `[train]` that differ for the target."""


def experiment_rules(rules: Any) -> Any:
    """See `rule_tables`. "central" is the baseline of pooled data: FedAvg with one client that has all examples."""
    tables = rule_tables(rules)
    return [
        {"label": "central", **table, "name": "fedavg", "pooled": True}
        if isinstance(table, dict) and table.get("name") == "central"
        else table
        for table in tables
    ]


class EvaluateSettings(Settings):
    """The tests of the model on the test set, and at the clients."""

    every: int = Field(1, ge=1)
    """The number of rounds from one test to the next."""
    last: int = Field(1, ge=1)
    """The final accuracy is the mean over the tests of this many last rounds."""
    validation: float = Field(0.0, ge=0, lt=1)
    """The share of the training examples that is held back to choose settings by, at the server or, with
    `evaluate.clients`, at every client; see `corymb sweep`."""
    clients: bool = False
    """Also test at every client, on a test part of its own. The mean over the clients then ranks the rules."""
    client_test: float = Field(0.2, gt=0, lt=1)
    """The share of a client's examples in its test part, unless the test set names the clients' sites."""
    new_clients: int = Field(0, ge=0)
    """The number of clients that take no part in the training, and are tested like the others."""
    drift: bool = False
    """Record for each client and round the length of its update, and its cosine with the step of the global
    model: the metrics `update-norm` and `update-cosine`. The server then keeps all models of a round."""
    budgets: list[int] = Field(default_factory=list)
    """Numbers of hostile voters for which voting rules report their certified accuracy."""


class RaySettings(Settings):
    """What Ray reserves for each running client, with `engine = "ray"`."""

    cpus: int = Field(1, ge=1)
    """CPU cores."""
    gpus: float = Field(0.0, ge=0)
    """GPUs; a fraction shares one."""


class Claim(Settings):
    """A claim of a paper, for `corymb results`. It holds if the measure of `rule`, minus that of `than` if given, is
    between `least` and `most`.
    """

    claim: str
    """The claim in words."""
    rule: str
    """The label of a rule."""
    than: str | None = None
    """The label of a rule to compare with."""
    measure: str = "accuracy"
    """"accuracy" (or the task's score) in percent; "hostile", the mean share of the weight that hostile clients get;
    "seconds" per run; "rounds-to-0.8", the rounds until the score is 0.8, likewise "virtual-seconds-to-0.8" and
    "megabytes-to-0.8", and "megabytes" of the whole run; or a number in the records of rounds, such as "gamma" or
    "certified-10"."""
    ratio: bool = False
    """Compare by the ratio of `than` to `rule`, not by the difference: 3 means three times less."""
    least: float | None = None
    """The lower bound."""
    most: float | None = None
    """The upper bound."""

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if self.least is None and self.most is None:
            raise ValueError("a claim has no bounds; set least, most, or both")
        return self
