"""An experiment: a TOML file, checked as a whole before anything runs."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from corymb.client import TrainSettings
from corymb.simulations.engine.blocks import FEWEST
from corymb.simulations.settings import (
    AttackSettings,
    Claim,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    ParticipationSettings,
    PartitionSettings,
    ProxySettings,
    RaySettings,
    RuleSettings,
    Strict,
    TargetSettings,
)

SHIPPED = Path(__file__).parent / "experiments"


class Experiment(Strict):
    """Rules that compete on the same data, participation and seeds."""

    setting: str = ""  # what tables of results call it
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    rounds: int = Field(ge=1)
    seeds: list[int] = Field([0], min_length=1)
    fraction: float = Field(1.0, gt=0, le=1)
    engine: Literal["auto", "serial", "batched", "factored", "processes", "ray"] = "auto"
    blocks: int = Field(FEWEST, ge=1)
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
    ray: RaySettings = RaySettings()
    claims: list[Claim] = Field(default_factory=list)

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
