"""An experiment in a federation: the same file as in a simulation, but each site trains on its own data.

The app is the same for all experiments, so a site approves it once; the experiment travels in its run config. A site
reads the file or folder `data` of its node config, with the settings of `[data]`, and standardises tables by its own
training examples.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import nn
from torch.utils.data import TensorDataset

from corymb.client import make_client_app
from corymb.protocol.run_config import flatten
from corymb.server.app import main as run_server
from corymb.server.deployment import run
from corymb.server.rule_settings import RuleSettings
from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.sources import DataSettings
from corymb.simulations.data.targets import outputs_of
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.models import make_model

KEY = "experiment"  # of the run config: the settings of one run, as JSON in base64, as Flower takes no quotes
PLACE = "corymb.simulations.experiments.federated"
UNUSED = ("engine", "blocks", "partition", "participation", "proxy", "devices", "attack", "target", "ray")
GUESSES = ("Labels became", "Dropped, as", "The label is")  # notes of a reader that must be the same everywhere


def write_app(folder: Path) -> None:
    """Write the app for experiments into `folder`."""
    run.write_app(folder, "corymb-experiments", f"{PLACE}:server", f"{PLACE}:client", {KEY: ""})


def runs_of(experiment: Experiment, sites: int) -> Iterator[tuple[str, str]]:
    """Yield a title and the settings of each run, one per rule and seed, for a federation of so many `sites`.

    The experiment's own data are read, because the model depends on their shape and on the number of classes. Raises
    `ValueError` if they cannot be read, or if a rule needs what a federation does not have.
    """
    source = experiment.data.load(experiment.task.kind)
    parts = (source.train, source.test)
    classes = max(outputs_of(part.targets, part.inputs, experiment.task) for part in parts)
    model = {
        "kind": experiment.model.kind, "shape": list(source.train.inputs.shape[1:]), "classes": classes,
        "options": experiment.model.options,
    }  # fmt: skip
    data = experiment.data.model_dump(exclude_defaults=True, exclude={"source", "site", "examples"})
    task = experiment.task.model_dump(exclude_defaults=True)
    for rule in experiment.rules:
        if rule.make().needs_proxy:
            raise ValueError(f"The rule {rule.title!r} needs proxy data, which an experiment in a federation has not.")
        if rule.pooled:
            raise ValueError(f"The rule {rule.title!r} pools the data of all sites, which a federation cannot.")
        train = experiment.train_for(rule).model_dump(exclude_defaults=True)
        for seed in experiment.seeds:
            table = rule.model_dump(exclude_defaults=True, include=set(RuleSettings.model_fields))
            config = {
                "model": {"kind": f"{PLACE}:make_module", "options": {"model": json.dumps(model)}},
                # Settings of training travel in the messages, as those of a rule do.
                "rules": {**table, "train": {**train, "seed": seed}},
                "rounds": experiment.rounds, "fraction": experiment.fraction, "seed": seed,
                "min_available_nodes": sites, **({"task": task} if task else {}),
                **({"drift": True} if experiment.evaluate.drift else {}),
            }  # fmt: skip
            settings = {
                "config": flatten(config), "model": model, "data": data, "guesses": _guesses(source),
                "kind": experiment.task.kind, "task": experiment.task.flat(),
            }  # fmt: skip
            yield f"{rule.title}, seed {seed}", b64encode(json.dumps(settings).encode()).decode()


def unused(experiment: Experiment) -> list[str]:
    """Return the settings of `experiment` that a federation does not use, as dotted keys."""
    evaluate = experiment.evaluate.model_dump(exclude_defaults=True, exclude={"drift"})
    data = experiment.data.model_dump(exclude_defaults=True, include={"site", "examples"})
    tables = [key for key in UNUSED if getattr(experiment, key) != Experiment.model_fields[key].get_default()]
    devices = [f"rules.{rule.title}.devices" for rule in experiment.rules if rule.devices]
    start = ["model.random_start"] if experiment.model.random_start else []
    return [*tables, *start, *devices, *(f"evaluate.{key}" for key in evaluate), *(f"data.{key}" for key in data)]


def settings_in(text: str) -> dict[str, Any]:
    """Return the settings of a run from the text that `runs_of` has made."""
    settings: dict[str, Any] = json.loads(b64decode(text))
    return settings


def make_module(model: str) -> nn.Module:
    """Return the experiment's model; `model` is its table as JSON, with the shape of the inputs and the classes."""
    table = json.loads(model)
    return make_model(table["kind"], tuple(table["shape"]), table["classes"], **table["options"])


server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the experiment in the run config."""
    context.run_config = dict(settings_in(str(context.run_config[KEY]))["config"])
    run_server(grid, context)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train on the site's own data."""
    return _reply(message, context)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the site's own test data."""
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    text = str(context.run_config[KEY])
    context.run_config = {**context.run_config, **settings_in(text)["task"]}
    return _client_of(text)(message, context)


@cache
def _client_of(text: str) -> ClientApp:
    settings = settings_in(text)

    def load_data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        return _site_data(str(context.node_config.get("data", "")), json.dumps(settings))

    return make_client_app(lambda: make_module(json.dumps(settings["model"])), load_data)


@cache
def _site_data(place: str, text: str) -> tuple[TensorDataset, TensorDataset]:
    """Return a site's examples. Raises `ValueError` if they are not like the experiment's."""
    settings: dict[str, Any] = json.loads(text)
    if not place:
        raise ValueError("this site names no data; set data in its policy")
    source = DataSettings(source=place, **settings["data"]).load(settings["kind"])
    shape, expected = list(source.train.inputs.shape[1:]), settings["model"]["shape"]
    if shape != expected:
        raise ValueError(f"an input at this site has the shape {shape}, and {expected} in the experiment")
    if (guesses := _guesses(source)) != settings["guesses"]:
        raise ValueError(
            f"the data at this site were read as {guesses}, and as {settings['guesses']} in the experiment"
        )
    return _dataset(source.train), _dataset(source.test)


def _guesses(source: Source) -> list[str]:
    return [note for note in source.notes if note.startswith(GUESSES)]


def _dataset(examples: Examples) -> TensorDataset:
    return TensorDataset(examples.inputs_at(slice(None)), examples.targets)
