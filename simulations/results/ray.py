"""A run of an experiment in Flower's own simulation: `flwr run`, with Ray under it.

Flower starts `server` and `client` in processes of its own; they find the experiment in the run config.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from corymb.simulations.data.clients import Client
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import Resolved, resolve
from corymb.simulations.grid.availability import with_availability
from corymb.simulations.grid.flower_simulation import FlowerRun, simulate
from corymb.simulations.grid.named_grid import NamedGrid, partition_reply
from corymb.simulations.results.run import OnRound, Run, clients_of

server = ServerApp()
client = ClientApp()


def run_with_ray(resolved: Resolved, rule: int, seed: int, folder: Path, on_round: OnRound | None = None) -> None:
    """Run the experiment's rule number `rule` with `seed`; the journal in `folder` is its record."""
    experiment = resolved.experiment
    config: dict[str, str | int] = {
        "experiment": experiment.model_dump_json(),
        "rule": rule,
        "seed": seed,
        "folder": str(Path.cwd()),
        "journal": str(folder.resolve()),
    }
    nodes = len(resolved.scenario(experiment.rules[rule], seed).names)
    apps = f"{__name__}:server", f"{__name__}:client"
    simulate(
        FlowerRun(*apps, config, nodes, experiment.ray.cpus, experiment.ray.gpus), folder, experiment.rounds, on_round
    )


@cache
def _run(text: str, rule: int, seed: int, folder: str) -> tuple[Run, Resolved]:
    """Once in each process."""
    if Path(folder).is_dir():
        os.chdir(folder)  # where the user stood: paths in an experiment may be relative
    torch.set_num_threads(1)
    resolved = resolve(Experiment.model_validate_json(text))
    return Run(resolved, resolved.experiment.rules[rule], seed), resolved


@cache
def _clients(text: str, rule: int, seed: int, folder: str) -> Client:
    _, resolved = _run(text, rule, seed, folder)
    key = resolved.key(resolved.experiment.rules[rule], seed)
    return clients_of(resolved, key).__enter__()  # for as long as the process lives


def _named(context: Context) -> tuple[str, int, int, str]:
    config = context.run_config
    return str(config["experiment"]), int(config["rule"]), int(config["seed"]), str(config["folder"])


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    run, _ = _run(*_named(context))
    named = NamedGrid(grid, run.scenario.names)
    run.serve(with_availability(named, run.participation), Path(str(context.run_config["journal"])))


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
    run, _ = _run(*named)
    own = run.node_config(int(context.node_config["partition-id"]))
    seen = Context(context.run_id, context.node_id, context.node_config | own, context.state, run.settings.flat())
    return _clients(*named)(message, seen)
