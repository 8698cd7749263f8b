"""The tables of settings that experiments and deployments share, and the run config of the ready ServerApp."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from corymb.protocol.home import home
from corymb.protocol.run_config import nest
from corymb.protocol.settings import Settings, problems
from corymb.protocol.task_settings import TaskSettings
from corymb.protocol.train_settings import TrainSettings
from corymb.server.rounds.backup_workers import DynamicBackupWorkers
from corymb.server.rounds.policy import Policy
from corymb.server.rounds.round_size import RoundSize, WaitForShare
from corymb.server.rule_settings import RuleSettings, rule_tables

log = logging.getLogger("flwr.corymb")


class ShareSettings(Settings):
    """A round waits for replies from a fixed share of the sampled clients; see `WaitForShare`."""

    kind: Literal["share"]
    share: float = Field(0.9, gt=0, le=1)
    """The share of the sampled clients."""

    def make(self) -> RoundSize[Any]:
        """Return the policy."""
        return WaitForShare(self.share)


class BackupWorkersSettings(Settings):
    """A round waits for a number of replies that it adapts to the observed times; see `DynamicBackupWorkers`."""

    kind: Literal["backup_workers"]
    rate: float = Field(gt=0)
    """The clients' learning rate times their number of steps in a round."""
    window: int = Field(5, ge=1)
    """The number of rounds over which estimates are averaged."""

    def make(self) -> RoundSize[Any]:
        """Return the policy."""
        return DynamicBackupWorkers(self.rate, self.window)


class ModelSettings(Settings):
    """The model. In place of the table, the text "module:function" is its `kind`."""

    kind: str
    """A function "module:function" that returns a `torch.nn.Module`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the function."""


class PolicySettings(Settings):
    """Limits on what one reply may do to the model; see `Policy`."""

    max_norm: float = Field(inf, gt=0)
    """The largest L2 norm of an update."""
    max_norm_ratio: float = Field(inf, gt=0)
    """The largest norm as a multiple of the median norm of earlier updates."""
    max_examples: float = Field(inf, gt=0)
    """The largest number of examples that a reply counts with."""
    enrolled: dict[str, float] = Field(default_factory=dict)
    """By site: the largest number of examples that its replies count with."""
    max_growth: float = Field(inf, ge=1)
    """The factor by which a site's number of examples may grow from one round to the next."""
    max_share: float = Field(1.0, gt=0, le=1)
    """The largest share of a round's examples that one reply has."""
    excess: Literal["clip", "reject"] = "clip"
    """Whether a reply beyond a limit is shortened to the limit or rejected."""
    max_strikes: int = Field(0, ge=0)
    """A site with so many rejected replies is left out for some rounds; 0: never."""
    quarantine_rounds: int = Field(10, ge=1)
    """The number of these rounds."""

    def make(self) -> Policy:
        """Return the policy."""
        return Policy(**self.model_dump())


class ProxySettings(Settings):
    """The server's own data, for rules that need proxy data."""

    data: str
    """A function "module:function" that returns inputs and targets."""


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def runs_folder() -> Path:
    """Return the folder of the journals of deployments: `runs` in `$CORYMB_HOME`, which is `~/.corymb` by default."""
    return home() / "runs"


class ServerSettings(Settings):
    """The settings that `corymb.server.app:app` reads from the run config."""

    model: Annotated[ModelSettings, BeforeValidator(_kind)]
    """The model that the federation trains."""
    rules: Annotated[tuple[RuleSettings], BeforeValidator(rule_tables)] = (RuleSettings(name="fedavg"),)
    """The rule: a name, or a table as in an experiment."""
    task: TaskSettings = TaskSettings()
    """What the model predicts, as in an experiment."""
    train: TrainSettings = TrainSettings()
    """Local training, as in an experiment."""
    rounds: int = Field(3, ge=1)
    """The number of rounds."""
    fraction: float = Field(1.0, gt=0, le=1)
    """The fraction of the connected nodes that train in a round."""
    fraction_evaluate: float = Field(1.0, ge=0, le=1)
    """The fraction of the connected nodes that evaluate each round's model."""
    min_available_nodes: int = Field(2, ge=1)
    """The first round starts when this many nodes are connected. A later round waits up to a minute for nodes that have
    left, and then goes on with the others, if there is one and at least `quorum`."""
    wait_seconds: float = Field(3600.0, gt=0)
    """How many seconds the run waits for enough nodes before it fails."""
    sites_to_start: int = Field(0, ge=0)
    """The number of nodes that train in a round, in place of `fraction`; 0 for none. Ask more than `quorum` needs."""
    deadline: float = Field(3600.0, gt=0)
    """How many seconds each phase of a round waits for replies. Ready clients stop training after 80 % of it."""
    round_size: Annotated[ShareSettings | BackupWorkersSettings, Field(discriminator="kind")] | None = None
    """The number of replies that a round waits for; without it, all of them."""
    proxy: ProxySettings | None = None
    """The server's own data."""
    quorum: int = Field(0, ge=0)
    """A round with fewer admitted replies is abandoned: the model stays as it was."""
    spill_bytes: float = Field(4e9, gt=0)
    """A rule that sees all models of a round has so many bytes of them in memory, and the rest in temporary files."""
    drift: bool = False
    """Record for each client the length of its update, and its cosine with the step of the global model."""
    policy: PolicySettings | None = None
    """Limits on each reply."""
    max_abandoned: int = Field(5, ge=1)
    """So many abandoned rounds in a row end the run as failed."""
    seed: int = 0
    """Seeds the first model and the sampling of nodes."""
    journal: str = ""
    """The journal's folder. A relative one lies in `~/.corymb/runs`, and "" is `run-` with the run's id. "none": no
    journal."""
    keep_every: int = Field(0, ge=0)
    """The journal keeps the model of every so many rounds, besides the last two and the best; 0 for none."""
    resume: bool = False
    """Go on with the run of an earlier ServerApp that is in the journal's folder. If `journal` is "", that is the last
    run of this app that is not complete."""

    def journal_folder(self, run_id: int) -> Path | None:
        """Return the folder of the journal of the Flower run `run_id`; None for no journal."""
        if self.journal == "none":
            return None
        return runs_folder() / (self.journal or f"run-{run_id}")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ServerSettings:
        """Read the settings from a run config. Raises `ValueError`, which names every wrong key.

        Unknown top-level keys belong to the app and are ignored, unless one resembles a known key: that is an error.
        """
        tables = nest(config)
        if "timeout" in tables:
            log.warning("The key timeout of the run config is called deadline.")
            tables.setdefault("deadline", tables.pop("timeout"))
        known = list(cls.model_fields)
        unknown = sorted(tables.keys() - set(known))
        for key in unknown:
            if near := get_close_matches(key, known, 1, cutoff=0.75):
                raise ValueError(f"Unknown key {key!r} in the run config. Did you mean {near[0]!r}?")
        if unknown:
            log.warning("The server ignores these keys of the run config: %s", ", ".join(unknown))
        try:
            return cls(**{key: value for key, value in tables.items() if key in known})
        except ValidationError as error:
            raise ValueError(f"The run config is invalid: {problems(error, cls)}.") from None
