"""A ClientApp from a module, a data function and a loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from corymb.client.batches import Examples, count, evaluation_batches, training_batches
from corymb.client.device import choose_device
from corymb.client.settings import TrainSettings
from corymb.client.trainer import Loss, evaluate, train
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import ARRAYS, EXAMPLES, METRICS, ROUND, of_kind

Data = Callable[[Context], tuple[Examples, Examples | None]]


def make_client_app(model: Callable[[], nn.Module], data: Data, loss: Loss = nn.functional.cross_entropy) -> ClientApp:
    """A ClientApp that trains and evaluates `model()` on what `data(context)` returns.

    `data` gives the site's training and evaluation examples (the latter may be None): datasets of
    (input, target), or DataLoaders; it is called for each message, so it should cache what is slow.
    `loss(outputs, targets)` returns a scalar. Settings are read from the keys `train.*` of the run
    config and, first, of the message's config (see `TrainSettings`). The batches and torch's random
    numbers follow from the seed, the site and the round: a site's name or partition-id in its node
    config, else Flower's id.

    Replies report `num-examples`, `loss`, `accuracy` (for class scores) and `seconds`.
    """
    app = ClientApp()
    built: list[nn.Module] = []  # once in a process, filled anew for each message; Ray pickles it, so no `cache`

    def module() -> nn.Module:
        if not built:
            built.append(model())
        return built[0]

    def prepared(message: Message, context: Context) -> tuple[nn.Module, TrainSettings, int]:
        configs = of_kind(message.content, ConfigRecord)
        settings = TrainSettings.read(context.run_config, *configs)
        server_round = _round(configs)
        device = choose_device(settings.device)
        arrays = _only(of_kind(message.content, ArrayRecord))
        filled = module()
        filled.load_state_dict(to_state(arrays))
        # After the module, whose making draws random numbers, but only in the process's first message.
        _seed_torch(_seed(settings.seed, context, server_round), device)
        return filled.to(device), settings, server_round

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        filled, settings, server_round = prepared(message, context)
        examples, _ = data(context)
        generator = torch.Generator().manual_seed(_seed(settings.seed, context, server_round, "batches"))
        batches = training_batches(examples, settings, generator)
        metrics = train(filled, batches, settings, loss, server_round)
        # Copies, because the next message fills the same module.
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in filled.state_dict().items()}
        content = RecordDict({ARRAYS: to_arrays(state), METRICS: _metrics(count(examples), metrics)})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        filled, settings, _ = prepared(message, context)
        _, examples = data(context)
        if examples is None:
            return Message(RecordDict({METRICS: _metrics(0, {})}), reply_to=message)
        metrics = evaluate(filled, evaluation_batches(examples), settings, loss)
        return Message(RecordDict({METRICS: _metrics(count(examples), metrics)}), reply_to=message)

    return app


def _metrics(examples: int, metrics: Mapping[str, float]) -> MetricRecord:
    return MetricRecord({EXAMPLES: examples, **metrics})


def _only(records: list[ArrayRecord]) -> ArrayRecord:
    if len(records) != 1:
        raise ValueError(f"The message carries {len(records)} ArrayRecords; send the model in one.")
    return records[0]


def _round(configs: list[ConfigRecord]) -> int:
    return next((int(cast(int, config[ROUND])) for config in configs if ROUND in config), 1)


def _seed(seed: int, context: Context, *parts: object) -> int:
    node = context.node_config
    site = node.get("name", node.get("partition-id", context.node_id))
    return random.Random("/".join(map(str, (seed, site, *parts)))).getrandbits(63)


def _seed_torch(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, which takes 0.7 ms because it keeps a stack trace for every device there is not."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
