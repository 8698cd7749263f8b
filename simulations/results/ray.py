"""Run an experiment in Flower's own simulation: `flwr run`, with Ray as the backend.

Flower starts `server` and `client` in its own processes; these read the experiment from the run config.
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
from corymb.simulations.grid.flower_simulation import FlowerRun, simulate
from corymb.simulations.grid.named_grid import NamedGrid, partition_reply
from corymb.simulations.results.run import OnRound, Run, clients_of

server = ServerApp()
client = ClientApp()


def run_with_ray(resolved: Resolved, rule: int, seed: int, folder: Path, on_round: OnRound | None = None) -> None:
    """Run the rule with index `rule` of the experiment with `seed`, and write its journal to `folder`."""
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
    """Prepare the run, once in each process."""
    if Path(folder).is_dir():
        os.chdir(folder)  # paths in an experiment are relative to the user's folder
    torch.set_num_threads(1)
    resolved = resolve(Experiment.model_validate_json(text))
    return Run(resolved, resolved.experiment.rules[rule], seed), resolved


@cache
def _clients(text: str, rule: int, seed: int, folder: str) -> Client:
    _, resolved = _run(text, rule, seed, folder)
    key = resolved.key(resolved.experiment.rules[rule], seed)
    return clients_of(resolved, key).__enter__()  # the context stays open until the process ends


def _run_key(context: Context) -> tuple[str, int, int, str]:
    """Return the arguments of `_run` from the run config."""
    config = context.run_config
    return str(config["experiment"]), int(config["rule"]), int(config["seed"]), str(config["folder"])


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    run, _ = _run(*_run_key(context))
    named_grid = NamedGrid(grid, run.scenario.names)
    run.serve(named_grid, Path(str(context.run_config["journal"])))


@client.query()
def _query(message: Message, context: Context) -> Message:
    return partition_reply(message, int(context.node_config["partition-id"]))


@client.train()
def _train(message: Message, context: Context) -> Message:
    return _reply(message, context)


@client.evaluate()
def _evaluate(message: Message, context: Context) -> Message:
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    """Return the reply of the experiment's client, which gets the same configs as on a `LocalGrid`."""
    key = _run_key(context)
    run, _ = _run(*key)
    extra = run.node_config(int(context.node_config["partition-id"]))
    local = Context(
        context.run_id,
        context.node_id,
        context.node_config | extra,
        context.state,
        run.config(Path(str(context.run_config["journal"]))),
    )
    return _clients(*key)(message, local)
