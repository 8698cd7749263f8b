"""A ready ServerApp that reads its rule, model and rounds from the run config.

In an app's pyproject.toml:

    [tool.flwr.app.components]
    serverapp = "corymb.server.app:app"

    [tool.flwr.app.config]
    model = "my_app.model:make_model"    # a function without arguments that returns a torch.nn.Module
    num-server-rounds = 10
    min-available-nodes = 3
    journal = "journal"                  # folder; "" keeps no journal
    rule.name = "fedau"
    rule.cutoff = 50                     # any other key under rule is a parameter of it
    proxy = "my_app.data:server_data"    # a function returning inputs and targets, for rules that need them
    step.optimizer = "Adam"              # a server optimiser after the rule; step.learning_rate, step.options.*
    guard = "median,krum"                # candidates besides the rule's model and the one before; "" for these two only
    wait-share = 0.9                     # of the asked sites; the round does not wait for the rest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from corymb.protocol.codec import to_arrays
from corymb.server.guard import Guard
from corymb.server.journal import Journal
from corymb.server.patience import WaitForShare
from corymb.server.strategy import FlowerStrategy
from corymb.strategies import Layout, Proxy, Rule, Step, make_rule

app = ServerApp()


class ServerSettings(BaseModel):
    """The keys of the run config that the server reads; others are the client's. Times are in seconds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    num_server_rounds: int = Field(3, ge=1, alias="num-server-rounds")
    min_available_nodes: int = Field(2, ge=1, alias="min-available-nodes")
    fraction_train: float = Field(1.0, gt=0, le=1, alias="fraction-train")
    fraction_evaluate: float = Field(1.0, ge=0, le=1, alias="fraction-evaluate")
    timeout: float = Field(3600.0, gt=0)
    wait_share: float | None = Field(None, gt=0, le=1, alias="wait-share")
    proxy: str = ""
    guard: str | None = None
    seed: int = 0
    journal: str = ""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ServerSettings:
        """From a run config. Raises `ValueError` naming everything that is wrong."""
        ours = [field.alias or name for name, field in cls.model_fields.items()]
        for key in config.keys() - set(ours):
            if "." not in key and (near := get_close_matches(key.replace("_", "-"), ours, 1, cutoff=0.85)):
                raise ValueError(f"The run config has a key {key!r}; did you mean {near[0]!r}?")
        try:
            return cls(**config)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"The run config is wrong: {wrong}.") from None


def rule_from(config: Mapping[str, Any]) -> Rule[Any]:
    """The rule that `rule.name` names, FedAvg without, with the other `rule.*` keys as its parameters.

    A parameter that is a rule itself nests: `rule.rule.name`, `rule.rule.hostile`.
    """
    parameters = _under("rule", config)
    return make_rule(parameters.pop("name", "fedavg"), **parameters)


def step_from(config: Mapping[str, Any]) -> Step | None:
    """The server optimiser that the `step.*` keys describe, if there are any."""
    settings = _under("step", config)
    if unknown := settings.keys() - {"optimizer", "learning_rate", "options"}:
        raise ValueError(
            f"The run config has a key 'step.{min(unknown)}'; there are optimizer, learning_rate, options."
        )
    return Step(**settings) if settings else None


def guard_from(names: str | None) -> Guard | None:
    """The guard with the rules called `names`, comma-separated; none for None."""
    if names is None:
        return None
    return Guard(tuple(make_rule(name.strip()) for name in names.split(",") if name.strip()))


def _under(prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `prefix.*` of a flat config as nested tables."""
    tables: dict[str, Any] = {}
    for key, value in config.items():
        first, *path = key.split(".")
        if first == prefix and path:
            table = tables
            for part in path[:-1]:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise ValueError(
                        f"The run config has a key that {key!r} lies within; write a rule's name as .name."
                    )
            table[path[-1]] = value
    return tables


def function(key: str, reference: str) -> Callable[[], Any]:
    """What the `reference` "module:name" at `key` refers to. Raises `ValueError` when it cannot be imported."""
    module, _, name = reference.partition(":")
    try:
        found: Callable[[], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The {key} {reference!r} cannot be imported: {error}; write 'module:function'.") from None
    return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    settings = ServerSettings.read(context.run_config)
    rule = rule_from(context.run_config)
    torch.manual_seed(settings.seed)
    module: nn.Module = function("model", settings.model)()
    proxy = Proxy(module, *function("proxy", settings.proxy)()) if settings.proxy else None
    layout = Layout.of_module(module)
    journal = Journal(Path(settings.journal)) if settings.journal else None
    strategy = FlowerStrategy(
        rule,
        step=step_from(context.run_config),
        guard=guard_from(settings.guard),
        patience=WaitForShare(settings.wait_share) if settings.wait_share else None,
        proxy=proxy,
        fraction_train=settings.fraction_train,
        fraction_evaluate=settings.fraction_evaluate,
        min_available_nodes=settings.min_available_nodes,
        seed=settings.seed,
        buffers=[entry.name for entry in layout.buffers],
        journal=journal,
    )
    try:
        strategy.start(grid, to_arrays(module.state_dict()), settings.num_server_rounds, timeout=settings.timeout)
    finally:
        if journal is not None:
            journal.close()
