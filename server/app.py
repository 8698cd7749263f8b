"""A ready ServerApp that reads the rule, the model and the number of rounds from the run config.

The keys are those of an experiment's tables. In the pyproject.toml of a Flower app:

    [tool.flwr.app.components]
    serverapp = "corymb.server.app:app"

    [tool.flwr.app.config]
    model = "my_app.model:make_model"    # returns a torch.nn.Module; model.options.* are its arguments
    rules = "fedau"                      # or a table: rules.name, rules.parameters.*, rules.server_optimizer.*, ...
    rounds = 10
    min_available_nodes = 3
    journal = ""                         # a folder; "" for ~/.corymb/runs/RUN-ID, "none" for no journal
    train.epochs = 1                     # and any other key of [train]

`ServerSettings` lists all keys. Lists are written as JSON strings, such as rules.candidate_election = '["median"]'.
"""

from __future__ import annotations

import logging

import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from corymb.protocol.codec import to_arrays
from corymb.protocol.run_config import flatten
from corymb.protocol.shared_state import shared_state
from corymb.server.journal import Journal
from corymb.server.journal.models import APP, unfinished_run
from corymb.server.rounds.orders import release
from corymb.server.settings import ServerSettings, runs_folder
from corymb.server.strategy import FlowerStrategy
from corymb.strategies import Layout, Proxy
from corymb.strategies.core.registry import import_reference

log = logging.getLogger("flwr.corymb")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federated training that the run config describes."""
    settings = ServerSettings.read(context.run_config)
    (rule,) = settings.rules
    torch.manual_seed(settings.seed)
    module: nn.Module = import_reference(settings.model.kind, "model")(**settings.model.options)
    proxy = Proxy(module, *import_reference(settings.proxy.data, "proxy data")()) if settings.proxy else None
    folder, app_id = settings.journal_folder(context.run_id), str(grid.run.fab_id)
    if settings.resume and not settings.journal:
        folder = unfinished_run(runs_folder(), app_id) or folder
    notes = {"flower-run": str(context.run_id)}  # so that a ServerApp that Flower starts again under this run goes on
    journal = Journal(folder, keep_every=settings.keep_every, notes={**notes, APP: app_id}) if folder else None
    is_same_run = journal is not None and notes.items() <= journal.about().items()
    resume = journal is not None and (settings.resume or is_same_run)
    if journal is not None:
        log.info("Journal: %s", folder)
        if not is_same_run:
            release(journal.folder)
    shared = shared_state(module, rule.train_under(settings.train))
    strategy = FlowerStrategy(
        rule.make(),
        server_optimizer=rule.make_server_optimizer(),
        candidate_election=rule.make_election(),
        round_size=settings.round_size.make() if settings.round_size else None,
        proxy=proxy,
        fraction_train=settings.fraction,
        fraction_evaluate=settings.fraction_evaluate,
        min_available_nodes=settings.min_available_nodes,
        wait_seconds=settings.wait_seconds,
        sites_to_start=settings.sites_to_start,
        quorum=settings.quorum,
        spill_bytes=settings.spill_bytes,
        policy=settings.policy.make() if settings.policy else None,
        max_abandoned=settings.max_abandoned,
        seed=settings.seed,
        buffers=[entry.name for entry in Layout.of_module(module).buffers],
        journal=journal,
        resume=resume,
        shares_nothing=not shared,
        drift=settings.drift,
    )
    train = ConfigRecord({**flatten({"train": rule.train_table()})})  # settings in a message override the run config
    try:
        initial = [to_arrays(shared)]
        del module, shared  # `start` frees the first model once it has its own copy, if nobody else holds it
        strategy.start(
            grid, initial.pop(), settings.rounds, settings.deadline, train_config=train, evaluate_config=train.copy()
        )
    finally:
        if journal is not None:
            journal.close()
