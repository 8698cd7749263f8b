"""The table `[task]`: what the model predicts. Server and clients read it from the same run config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from corymb.protocol.run_config import Scalar, flatten, nest
from corymb.protocol.settings import Settings, problems

PREFIX = "task."  # of all keys of these settings in a run config
Kind = Literal["classification", "binary", "multilabel", "regression", "quantile", "segmentation", "tokens", "survival"]

# The metrics of each kind, in the order of tables: the first one ranks rules.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "binary": ("auroc", "accuracy", "balanced-accuracy", "f1"),
    "multilabel": ("auroc", "accuracy", "f1"),
    "regression": ("mae", "rmse", "r2"),
    "quantile": ("pinball", "coverage"),
    "segmentation": ("miou", "accuracy"),
    "tokens": ("perplexity", "accuracy"),
    "survival": ("c-index",),
}
LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse", "pinball", "perplexity", "ece"})


class TaskSettings(Settings):
    """What the model predicts, and how the predictions are judged.

    `flat` and `read` convert to and from the keys `task.*` of a run config.
    """

    kind: Kind = "classification"
    """The kind of prediction; it decides the loss, the metrics and the shapes of outputs and targets."""
    loss: str = ""
    """A function "module:function" that is called with outputs and targets and returns a scalar. Default: the kind's
    own loss."""
    metrics: list[str] = Field(default_factory=list)
    """Names of metrics, or functions "module:function" of all outputs and targets. Default: the kind's own. The first
    one ranks rules."""
    quantiles: list[float] = Field([0.1, 0.5, 0.9], min_length=1)
    """The quantiles that a model of kind "quantile" predicts, one per output, in rising order."""

    @model_validator(mode="after")
    def _check(self) -> TaskSettings:
        rising = all(low < high for low, high in zip([0.0, *self.quantiles], [*self.quantiles, 1.0], strict=True))
        if not rising:
            raise ValueError(f"quantiles = {self.quantiles} must rise strictly between 0 and 1")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics; that of a function is its name without the module."""
        return tuple(name.rpartition(":")[2] for name in self.metrics) or METRICS[self.kind]

    @classmethod
    def read(cls, *configs: Mapping[str, Any]) -> TaskSettings:
        """Read the keys `task.*` of flat `configs`; a later config overrides an earlier one.

        Raises `ValueError`, which names every wrong key.
        """
        merged = {key: value for config in configs for key, value in config.items() if key.startswith(PREFIX)}
        return _parse(json.dumps(merged, sort_keys=True))

    def flat(self) -> dict[str, Scalar]:
        """Return the settings that differ from their defaults, as keys of a run config; the inverse of `read`."""
        return flatten({"task": self.model_dump(exclude_defaults=True)})


@lru_cache(maxsize=64)
def _parse(settings: str) -> TaskSettings:
    try:
        return TaskSettings(**nest(json.loads(settings)).get("task", {}))
    except ValidationError as error:
        raise ValueError(f"The task's settings are invalid: {problems(error, TaskSettings, PREFIX)}.") from None
