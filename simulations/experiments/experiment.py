"""An experiment: rules that compete on the same data, participation and seeds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from corymb.client import TrainSettings
from corymb.protocol.settings import Settings, problems
from corymb.server.settings import RuleSettings, rule_tables
from corymb.simulations.data.attacks import AttackSettings, ShuffledLabels
from corymb.simulations.data.participation_settings import AlwaysSettings, ParticipationSettings
from corymb.simulations.data.partition_settings import DirichletSettings, PartitionSettings
from corymb.simulations.data.sources import DataSettings
from corymb.simulations.engine.blocks import FEWEST
from corymb.simulations.experiments.settings import (
    Claim,
    EvaluateSettings,
    ExperimentRule,
    ModelSettings,
    ProxySettings,
    RaySettings,
    TargetSettings,
)


def _counted(seeds: Any) -> Any:
    """`seeds = 3` is 0, 1 and 2."""
    return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds


class Experiment(Settings):
    """Rules that compete on the same data, participation and seeds; `reader.read` makes one from a TOML file.

    `setting` is what tables of results call it. `fraction` of the clients are asked in each round.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    rounds: int = Field(ge=1)
    seeds: Annotated[list[int], BeforeValidator(_counted), Field(min_length=1)] = Field([0])
    fraction: float = Field(1.0, gt=0, le=1)
    engine: Literal["auto", "serial", "batched", "low_rank", "processes", "ray"] = "auto"
    blocks: int = Field(FEWEST, ge=1)
    setting: str = ""
    rules: Annotated[list[ExperimentRule], BeforeValidator(rule_tables), Field(min_length=1)]
    data: DataSettings = DataSettings()
    partition: PartitionSettings = DirichletSettings()
    participation: ParticipationSettings = AlwaysSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    proxy: ProxySettings = ProxySettings()
    attack: AttackSettings = ShuffledLabels()
    target: TargetSettings = TargetSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    ray: RaySettings = RaySettings()
    claims: list[Claim] = Field(default_factory=list)

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
        if self.train.seed:
            raise ValueError(f"train.seed = {self.train.seed} has no effect here; set seeds")
        if self.target.examples:
            _checked(self.target_train, "target.train.")
        for place, rule in enumerate(self.rules):
            _checked(lambda rule=rule: self.train_for(rule), f"rules.{place}.train.")
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

    def honest(self) -> Experiment:
        """The same with every client honest."""
        return self.model_copy(update={"attack": ShuffledLabels()})


def _checked(make: Any, prefix: str) -> None:
    try:
        make()
    except ValidationError as error:
        raise ValueError(problems(error, TrainSettings, prefix)) from None
