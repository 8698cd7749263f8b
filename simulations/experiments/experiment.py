"""The settings of an experiment, which compares rules on the same data, participation and seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from corymb.client import TrainSettings
from corymb.client.local_work import algorithm_of
from corymb.client.tasks.task import make_task
from corymb.protocol.settings import Settings, problems
from corymb.protocol.task_settings import TaskSettings
from corymb.server.rule_settings import RuleSettings
from corymb.simulations.data.attacks import AttackSettings, ModelAttack
from corymb.simulations.data.colluding_attacks import ColludingAttack
from corymb.simulations.data.data_attacks import ShuffledLabels
from corymb.simulations.data.devices import DevicesSettings
from corymb.simulations.data.participation_settings import AlwaysSettings, ParticipationSettings
from corymb.simulations.data.partition_settings import DirichletSettings, PartitionSettings
from corymb.simulations.data.sources import DataSettings
from corymb.simulations.engine.blocks import MIN_BLOCKS
from corymb.simulations.experiments.settings import (
    Claim,
    EvaluateSettings,
    ExperimentRule,
    ModelSettings,
    ProxySettings,
    RaySettings,
    TargetSettings,
    experiment_rules,
)


def _seed_list(seeds: Any) -> Any:
    """Expand a number of seeds, `seeds = 3`, to `[0, 1, 2]`."""
    if not isinstance(seeds, int) or isinstance(seeds, bool):
        return seeds
    if seeds < 1:
        raise ValueError(f"{seeds} seeds are no run; use at least 1")
    return list(range(seeds))


class Experiment(Settings):
    """An experiment: a comparison of rules on the same data, participation and seeds.

    `reader.read` makes one from a TOML file.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra={"default": "the file's name"})
    """Names the folder of results, `runs/NAME`."""
    rounds: int = Field(ge=1)
    """The number of rounds."""
    seeds: Annotated[list[int], BeforeValidator(_seed_list), Field(min_length=1)] = Field([0])
    """A list of seeds, or how many: 3 means 0, 1, 2."""
    fraction: float = Field(1.0, gt=0, le=1)
    """The share of the clients that the server samples in each round."""
    engine: Literal["auto", "serial", "batched", "low_rank", "processes", "ray"] = "auto"
    """How clients are trained; see the guide for researchers."""
    blocks: int = Field(MIN_BLOCKS, ge=1)
    """The number of blocks that the clients of a round are trained in. Another number changes the last bits of the
    results."""
    setting: str = ""
    """One line that describes the experiment in tables of results."""
    rules: Annotated[list[ExperimentRule], BeforeValidator(experiment_rules), Field(min_length=1)]
    """The rules to compare, by name or as tables."""
    data: DataSettings = DataSettings()
    """Where the examples come from."""
    partition: PartitionSettings = DirichletSettings()
    """How the training examples are distributed over the clients."""
    participation: ParticipationSettings = AlwaysSettings()
    """Which clients are online in each round."""
    model: ModelSettings = ModelSettings()
    """The model."""
    task: TaskSettings = TaskSettings()
    """What the model predicts."""
    train: TrainSettings = TrainSettings()
    """Local training."""
    proxy: ProxySettings = ProxySettings()
    """The server's own data."""
    devices: DevicesSettings = DevicesSettings()
    """How long clients compute and how fast they send, in virtual time."""
    attack: AttackSettings = ShuffledLabels()
    """Hostile clients."""
    target: TargetSettings = TargetSettings()
    """A client whose kind of data is all that counts."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """The tests of the model."""
    ray: RaySettings = RaySettings()
    """Resources of a client under `engine = "ray"`."""
    claims: list[Claim] = Field(default_factory=list)
    """Claims that `corymb results` measures."""

    if not TYPE_CHECKING:  # for which the fields are the arguments

        def __init__(self, **table: Any) -> None:
            """Raises `ValueError` that lists all problems with their keys."""
            try:
                super().__init__(**table)
            except ValidationError as error:
                name = table.get("name", "without a name")
                raise ValueError(f"The experiment {name} is invalid: {problems(error, Experiment)}.") from None

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        slugs = [rule.slug for rule in self.rules]
        if duplicates := {slug for slug in slugs if slugs.count(slug) > 1}:
            raise ValueError(f"two rules have the label {min(duplicates)!r}; give each rule a different label")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {self.seeds} must be different whole numbers, 0 or greater")
        titles = {rule.title for rule in self.rules}
        for claim in self.claims:
            if unknown := {claim.rule, claim.than} - titles - {None}:
                raise ValueError(f"a claim names the rule {unknown.pop()!r}; the rules are {', '.join(sorted(titles))}")
        for rule in self.rules:
            if rule.make().needs_proxy and not self.proxy.examples:
                raise ValueError(f"the rule {rule.title!r} needs proxy data; set proxy.examples")
        if self.evaluate.new_clients and not self.evaluate.clients:
            raise ValueError(f"evaluate.new_clients = {self.evaluate.new_clients} needs evaluate.clients = true")
        if self.engine == "ray" and (self.evaluate.clients or any(rule.pooled for rule in self.rules)):
            raise ValueError("engine = 'ray' has no evaluate.clients and no rule 'central'; use another engine")
        devices = [self.devices_for(rule) for rule in self.rules]
        has_buffer = any(each.buffer for each in devices)
        if any(each.is_timed for each in devices) and (self.engine == "ray" or (has_buffer and self._is_offline)):
            raise ValueError("devices need another engine than 'ray'; devices.buffer needs clients always online")
        if has_buffer and any(rule.candidate_election is not None for rule in self.rules):
            raise ValueError("devices.buffer has no rounds, so there is no candidate_election; leave one of them out")
        if self.train.seed:
            raise ValueError(f"train.seed = {self.train.seed} has no effect in an experiment; set seeds")
        if self.target.examples:
            _check_train(self.target_train, "target.train.")
        make_task(self.task)
        for index, rule in enumerate(self.rules):
            _check_train(lambda rule=rule: self.train_for(rule), f"rules.{index}.train.")
            algorithm = algorithm_of(self.train_for(rule))
            if algorithm.needs_rule not in ("", rule.make().client_algorithm):
                raise ValueError(
                    f"the clients under {rule.title!r} run an algorithm that needs what the rule "
                    f"{algorithm.needs_rule!r} sends; use that rule"
                )
            if algorithm.remembers and self.devices_for(rule).buffer:
                raise ValueError(
                    f"the rule {rule.title!r} needs rounds, because server and clients would keep different updates of "
                    "a late reply; leave out devices.buffer for it"
                )
        if any(self.train_for(rule).compression for rule in self.rules) and isinstance(
            self.attack, ModelAttack | ColludingAttack
        ):
            raise ValueError("an attack on models cannot change compressed updates; leave out attack or compression")
        return self

    def devices_for(self, rule: ExperimentRule) -> DevicesSettings:
        """Return the devices under `rule`."""
        if not rule.devices:
            return self.devices
        try:
            return DevicesSettings(**{**self.devices.model_dump(exclude_defaults=True), **rule.devices})
        except ValidationError as error:
            raise ValueError(problems(error, DevicesSettings, f"the devices of {rule.title!r}: ")) from None

    @property
    def _is_offline(self) -> bool:
        """Whether clients are offline at times."""
        return not isinstance(self.participation, AlwaysSettings)

    def target_train(self) -> TrainSettings:
        """Return the overrides of local training at the target client, which always sends its batch updates."""
        return TrainSettings(**self.target.train, batch_updates=True)

    def train_for(self, rule: RuleSettings) -> TrainSettings:
        """Return the settings of local training under `rule`."""
        return rule.train_under(self.train)

    def honest(self) -> Experiment:
        """Return this experiment without hostile clients."""
        return self.model_copy(update={"attack": ShuffledLabels()})


def _check_train(make: Any, prefix: str) -> None:
    """Call `make`; report invalid training settings as a `ValueError` whose keys begin with `prefix`."""
    try:
        make()
    except ValidationError as error:
        raise ValueError(problems(error, TrainSettings, prefix)) from None
