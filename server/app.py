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
from corymb.server.journal import Journal
from corymb.server.strategy import FlowerStrategy
from corymb.strategies import Layout, Rule, make_rule

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
    """The rule that `rule.name` names, FedAvg without, with the other `rule.*` keys as its parameters."""
    parameters = {key.removeprefix("rule."): value for key, value in config.items() if key.startswith("rule.")}
    return make_rule(parameters.pop("name", "fedavg"), **parameters)


def model_factory(reference: str) -> Callable[[], nn.Module]:
    """What `module:name` refers to. Raises `ValueError` when it cannot be imported."""
    module, _, name = reference.partition(":")
    try:
        factory: Callable[[], nn.Module] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The model {reference!r} cannot be imported: {error}; write 'module:function'.") from None
    return factory


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    settings = ServerSettings.read(context.run_config)
    rule = rule_from(context.run_config)
    torch.manual_seed(settings.seed)
    module = model_factory(settings.model)()
    layout = Layout.of_module(module)
    journal = Journal(Path(settings.journal)) if settings.journal else None
    strategy = FlowerStrategy(
        rule,
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
