"""An experiment: a TOML file, checked as a whole before anything runs."""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from corymb.client import TrainSettings
from corymb.server import Guard
from corymb.strategies import Rule, Step, make_rule

SHIPPED = Path(__file__).parent / "experiments"


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
    """How the examples are spread over clients; "site" takes the data's own sites, and their number."""

    kind: Literal["dirichlet", "shards", "iid", "site"] = "dirichlet"
    clients: int = Field(10, ge=1)
    alpha: float = Field(0.1, gt=0)
    shards_per_client: int = Field(2, ge=1)


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


class Experiment(Strict):
    """Rules that compete on the same data, participation and seeds."""

    setting: str = ""  # what tables of results call it
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    rounds: int = Field(ge=1)
    seeds: list[int] = Field([0], min_length=1)
    fraction: float = Field(1.0, gt=0, le=1)
    engine: Literal["serial", "batched"] = "serial"
    rules: list[RuleSettings] = Field(min_length=1)
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    participation: ParticipationSettings = ParticipationSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    proxy: ProxySettings = ProxySettings()
    attack: AttackSettings = AttackSettings()
    target: TargetSettings = TargetSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    claims: list[Claim] = []

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, seeds: Any) -> Any:
        return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @field_validator("rules", mode="before")
    @classmethod
    def _names(cls, rules: Any) -> Any:
        if not isinstance(rules, list):
            raise ValueError(f'{rules!r} is no list; write rules = ["fedavg", "fedau"]')
        return [{"name": rule} if isinstance(rule, str) else rule for rule in rules]

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        slugs = [rule.slug for rule in self.rules]
        if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
            raise ValueError(f"the label {min(twice)!r} stands for two rules; give each a label of its own")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {self.seeds} must be different numbers from 0 on")
        titles = {rule.title for rule in self.rules}
        for claim in self.claims:
            if unknown := {claim.rule, claim.than} - titles - {None}:
                raise ValueError(f"a claim is about {unknown.pop()!r}, and the rules are {', '.join(sorted(titles))}")
        for rule in self.rules:
            if rule.make().needs_proxy and not self.proxy.examples:
                raise ValueError(f"the rule {rule.title!r} needs data of the server's own; set proxy.examples")
        if self.target.examples:
            try:
                self.target_train()
            except ValidationError as error:
                raise ValueError("; ".join(_told(e, ("target.train",)) for e in error.errors())) from None
        if self.train.seed:
            raise ValueError(f"train.seed = {self.train.seed} has no effect here; set seeds")
        for place, rule in enumerate(self.rules):
            try:
                self.train_for(rule)
            except ValidationError as error:
                wrong = "; ".join(_told(e, (f"rules.{place}.train",)) for e in error.errors())
                raise ValueError(wrong) from None
        return self

    def target_train(self) -> TrainSettings:
        """What the target site trains with, apart from what all do."""
        return TrainSettings(**self.target.train, batch_updates=True)

    def train_for(self, rule: RuleSettings) -> TrainSettings:
        """Local training under `rule`."""
        if not rule.train:
            return self.train
        base = self.train.model_dump(exclude_defaults=True)
        if rule.train.keys() & {"epochs", "steps"}:  # one takes the place of the other
            base = {key: value for key, value in base.items() if key not in ("epochs", "steps")}
        return TrainSettings(**{**base, **rule.train})


def read(path: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """The experiment in `path`, or the shipped one of that name, with `changes {dotted key: value}` applied.

    Raises `ValueError` listing everything that is wrong, with its place.
    """
    found = next((p for p in (path, SHIPPED / path, SHIPPED / f"{path}.toml") if p.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise ValueError(f"There is no experiment {str(path)!r}; give a TOML file or a shipped one: {shipped}.")
    try:
        table = tomllib.loads(found.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The experiment {found.name} is not valid TOML: {error}.") from None
    if base := table.pop("based_on", None):
        table = _merged(tomllib.loads((SHIPPED / f"{base}.toml").read_text()), table)
    for key, value in (changes or {}).items():
        _set(table, key, value)
    try:
        return Experiment(**{"name": found.stem, **table})
    except ValidationError as error:
        wrong = "; ".join(_told(e) for e in error.errors())
        raise ValueError(f"The experiment {found.name} is wrong: {wrong}.") from None


def parse_change(text: str) -> tuple[str, Any]:
    """`key=value` with a TOML value; what is no TOML value is a string. Raises `ValueError` without a "="."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"The change {text!r} has no key and value; write it as train.learning_rate=0.05.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`, table by table."""
    both = {
        k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }
    return base | both


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"The change {key!r} goes through {part!r}, which is no table.")
    table[last] = value


def _told(error: Any, within: tuple[str, ...] = ()) -> str:
    """One error of pydantic's, with its path."""
    place = ".".join(str(part) for part in (*within, *error["loc"])) or "experiment"
    if error["type"] == "extra_forbidden":
        keys = list(TrainSettings.model_fields) if within else _keys(error["loc"])
        near = get_close_matches(str(error["loc"][-1]), keys, 1)
        return f"{place} is no known key" + (f" (did you mean {near[0]!r}?)" if near else "")
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    if error["type"] in ("value_error", "missing"):
        return f"{place}: {message}"
    return f"{place} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(place: tuple[str | int, ...]) -> list[str]:
    model: Any = Experiment
    for part in place[:-1]:
        model = RuleSettings if isinstance(part, int) else model.model_fields[part].annotation
    return list(model.model_fields)
