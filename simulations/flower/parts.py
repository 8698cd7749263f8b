"""The ServerApp and the ClientApp of an experiment's run in Flower's simulation; the run config holds it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from corymb.simulations.experiment import Experiment
from corymb.simulations.federation import Federation
from corymb.simulations.flower.named_grid import NamedGrid, partition_reply

server = ServerApp()
client = ClientApp()


@cache
def _federation(text: str, rule: int, seed: int, folder: str) -> Federation:
    """Once in each process."""
    if Path(folder).is_dir():
        os.chdir(folder)  # where the user stood: paths in an experiment may be relative
    torch.set_num_threads(1)
    experiment = Experiment.model_validate_json(text)
    return Federation(experiment, experiment.rules[rule], seed)


@cache
def _clients(text: str, rule: int, seed: int, folder: str) -> Any:
    app, _ = _federation(text, rule, seed, folder).clients()
    return app


def _named(context: Context) -> tuple[str, int, int, str]:
    config = context.run_config
    return str(config["experiment"]), int(config["rule"]), int(config["seed"]), str(config["folder"])


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    federation = _federation(*_named(context))
    named = NamedGrid(grid, federation.scenario.names, federation.participation)
    federation.serve(named, Path(str(context.run_config["journal"])))


@client.query()
def _query(message: Message, context: Context) -> Message:
    return partition_reply(message, int(context.node_config["partition-id"]))


@client.train()
def _train(message: Message, context: Context) -> Message:
    return _answered(message, context)


@client.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return _answered(message, context)


def _answered(message: Message, context: Context) -> Message:
    """The reply of the experiment's own client, which sees the configs that it sees on a `LocalGrid`."""
    named = _named(context)
    federation = _federation(*named)
    own = federation.node_config(int(context.node_config["partition-id"]))
    seen = Context(
        context.run_id, context.node_id, context.node_config | own, context.state, federation.settings.flat()
    )
    reply: Message = _clients(*named)(message, seen)
    return reply
