"""How a site trains: the table `[train]`, which server and sites read from the same run config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from corymb.protocol.run_config import Scalar, flatten, nest
from corymb.protocol.settings import Settings, problems

PREFIX = "train."  # of these keys in a run config


class TrainSettings(Settings):
    """Local training. Either `steps` or `epochs`; options of the optimiser and schedule go to torch by name.

    `schedule` is a class of `torch.optim.lr_scheduler`, stepped once per round of the federation.
    `drop_last` skips a short last batch, unless a site has fewer examples than one batch; without `shuffle` every
    pass takes the examples in their own order. `proximal` is FedProx's mu (Li et al. 2020, eq. 2): each step is also
    drawn back to the model that the round began with.
    `batch_updates` sends the update of each batch along with the model, for FedDA and FedGP at their target
    site; `report_classes` sends how many examples of each class there are.
    """

    learning_rate: float = Field(0.1, gt=0)
    batch_size: int = Field(32, ge=1)
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    drop_last: bool = False
    shuffle: bool = True
    proximal: float = Field(0.0, ge=0)
    optimizer: str = "SGD"
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    schedule: str | None = None
    schedule_options: dict[str, Any] = Field(default_factory=dict)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    seed: int = 0
    batch_updates: bool = False
    report_classes: bool = False

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs = {self.epochs} and steps = {self.steps} exclude each other; give one")
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
        except Exception as error:  # torch raises whatever it likes
            raise ValueError(f"torch.optim cannot use this optimiser or schedule: {error}") from None
        return self

    @classmethod
    def read(cls, *configs: Mapping[str, Any]) -> TrainSettings:
        """From the keys `train.*` of flat `configs`, later ones first. Raises `ValueError` naming every wrong key."""
        merged = {key: value for config in configs for key, value in config.items() if key.startswith(PREFIX)}
        return _parsed(json.dumps(merged, sort_keys=True))

    def flat(self) -> dict[str, Scalar]:
        """The inverse of `read`: what to put into a run config."""
        return flatten({"train": self.model_dump(exclude_none=True, exclude_defaults=True)})

    def rate(self, server_round: int) -> float:
        """The learning rate in a round, from 1."""
        if self.schedule is None:
            return self.learning_rate
        return _schedule(self.schedule, self.learning_rate, json.dumps(self.schedule_options)).of(server_round)


@lru_cache(maxsize=256)
def _parsed(settings: str) -> TrainSettings:
    try:
        return TrainSettings(**nest(json.loads(settings)).get("train", {}))
    except ValidationError as error:
        wrong = problems(error, TrainSettings, PREFIX)
        raise ValueError(f"The training settings are wrong: {wrong}.") from None


class _Rates:
    """The rates of a schedule, round after round, worked out as far as they were asked for."""

    def __init__(self, schedule: str, initial: float, options: dict[str, Any]) -> None:
        self._optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
        self._scheduler = getattr(torch.optim.lr_scheduler, schedule)(self._optimizer, **options)
        self._rates = [float(self._optimizer.param_groups[0]["lr"])]  # a schedule may begin elsewhere

    def of(self, server_round: int) -> float:
        while len(self._rates) < server_round:
            self._optimizer.step()  # torch warns of a schedule that runs ahead of its optimiser
            self._scheduler.step()
            self._rates.append(float(self._optimizer.param_groups[0]["lr"]))
        return self._rates[server_round - 1]


@lru_cache(maxsize=256)
def _schedule(schedule: str, initial: float, options: str) -> _Rates:
    return _Rates(schedule, initial, json.loads(options))
