"""The table `[train]`: the settings of local training, which server and clients read from the same run config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from corymb.protocol.compression import CompressionSettings
from corymb.protocol.run_config import Scalar, flatten, nest
from corymb.protocol.settings import Settings, problems

# Methods that are all in what the clients do, so the rule is FedAvg.
CLIENT_METHODS = ("moon", "ditto", "apfl", "fedper", "fedrep", "fedbn", "fine_tuning")
PREFIX = "train."  # of all keys of these settings in a run config
EPOCHS, STEPS = f"{PREFIX}epochs", f"{PREFIX}steps"  # of which one is set


class TrainSettings(Settings):
    """The settings of local training.

    Set either `steps` or `epochs`. `flat` and `read` convert to and from the keys `train.*` of a run config.
    """

    learning_rate: float = Field(0.1, gt=0)
    """The optimiser's learning rate."""
    batch_size: int = Field(32, ge=1)
    """Examples in a batch."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the data in a round. Without `epochs` and `steps`: one."""
    steps: int | None = Field(None, ge=1)
    """Batches in a round, in place of `epochs`."""
    drop_last: bool = False
    """Skip a short last batch, unless the client has fewer examples than one batch."""
    shuffle: bool = True
    """Draw a new order of the examples for every epoch; false keeps the given order."""
    proximal: float = Field(0.0, ge=0)
    """mu of FedProx (Li et al. 2020, eq. 2): each step also moves the model towards the one that was sent."""
    optimizer: str = "SGD"
    """A class of `torch.optim`."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimiser, such as `momentum`."""
    schedule: str | None = None
    """A class of `torch.optim.lr_scheduler`, which makes one step per round."""
    schedule_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the schedule, such as `step_size`."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of activations and gradients."""
    device: str = "auto"
    """"auto" takes the best device of the machine; otherwise "cpu", "cuda", "cuda:0", "mps"."""
    seed: int = 0
    """Seeds the training of a deployment. An experiment uses `seeds` instead."""
    algorithm: str = ""
    """What a client does besides plain local training: "scaffold", "feddyn", "fednova", "moon", "ditto", "apfl",
    "fedper", "fedrep", "fedbn", "fine_tuning", or "module:Class". Default: nothing."""
    algorithm_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the algorithm, such as `pull` of "ditto"."""
    personal: list[str] = Field(default_factory=list)
    """Patterns of entries of the state dict that stay at the client, such as "head.*". ["*"] shares nothing."""
    compression: CompressionSettings | None = None
    """How the client compresses its update. Default: it sends its model as it is."""
    augment: str = ""
    """A function "module:function" that changes the inputs of each training batch, such as by random crops. It draws
    from torch's default generator, which is seeded for each client and round."""
    batch_updates: bool = False
    """Also send the update of each batch, which FedDA and FedGP need from their target client."""
    report_classes: bool = False
    """Also report the number of examples of each class."""

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; set only one of them")
        if self.optimizer == "SGD" and not self.optimizer_options and self.schedule is None:
            return self  # nothing to ask torch, whose first optimiser in a process takes seconds to import
        parameter = torch.nn.Parameter(torch.zeros(1, 1))
        parameter.grad = torch.zeros(1, 1)
        try:
            optimizer = getattr(torch.optim, self.optimizer)(
                [parameter], lr=self.learning_rate, **self.optimizer_options
            )
            scheduler = self.schedule and getattr(torch.optim.lr_scheduler, self.schedule)(
                optimizer, **self.schedule_options
            )
            optimizer.step()
            if scheduler:
                scheduler.step()
        except Exception as error:  # torch raises exceptions of many types
            raise ValueError(f"torch rejects the optimiser, the schedule or their options: {error}") from None
        return self

    @classmethod
    def read(cls, *configs: Mapping[str, Any]) -> TrainSettings:
        """Read the keys `train.*` of flat `configs`; a later config overrides an earlier one, also epochs by steps.

        Raises `ValueError`, which names every wrong key.
        """
        merged: dict[str, Any] = {}
        for config in configs:
            own = {key: value for key, value in config.items() if key.startswith(PREFIX)}
            for key, other in (EPOCHS, STEPS), (STEPS, EPOCHS):
                if key in own:
                    merged.pop(other, None)
            merged |= own
        return _parse(json.dumps(merged, sort_keys=True))

    def flat(self) -> dict[str, Scalar]:
        """Return the settings that differ from their defaults, as keys of a run config; the inverse of `read`."""
        return flatten({"train": self.model_dump(exclude_none=True, exclude_defaults=True)})

    def rate(self, server_round: int) -> float:
        """Return the learning rate of a round, counted from 1."""
        if self.schedule is None:
            return self.learning_rate
        return _schedule(self.schedule, self.learning_rate, json.dumps(self.schedule_options)).of(server_round)


@lru_cache(maxsize=256)
def _parse(settings: str) -> TrainSettings:
    try:
        return TrainSettings(**nest(json.loads(settings)).get("train", {}))
    except ValidationError as error:
        wrong = problems(error, TrainSettings, PREFIX)
        raise ValueError(f"The training settings are invalid: {wrong}.") from None


class _Rates:
    """The learning rate of each round under a schedule, computed up to the latest round requested."""

    def __init__(self, schedule: str, initial: float, options: dict[str, Any]) -> None:
        self._optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
        self._scheduler = getattr(torch.optim.lr_scheduler, schedule)(self._optimizer, **options)
        self._rates = [float(self._optimizer.param_groups[0]["lr"])]  # some schedules change the initial rate

    def of(self, server_round: int) -> float:
        while len(self._rates) < server_round:
            self._optimizer.step()  # torch warns if the schedule makes a step before the optimiser
            self._scheduler.step()
            self._rates.append(float(self._optimizer.param_groups[0]["lr"]))
        return self._rates[server_round - 1]


@lru_cache(maxsize=256)
def _schedule(schedule: str, initial: float, options: str) -> _Rates:
    return _Rates(schedule, initial, json.loads(options))
