"""A ClientApp from a module, a data function and a loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from corymb.client.batches import Examples, count, evaluation_batches, training_batches
from corymb.client.device import choose_device
from corymb.client.trainer import Loss, evaluate, train
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import ARRAYS, EXAMPLES, METRICS, ROUND, STEPS, of_kind
from corymb.protocol.train_settings import TrainSettings
from corymb.strategies.core.reply import CLASS

Data = Callable[[Context], tuple[Examples, Examples | None]]


def make_client_app(model: Callable[[], nn.Module], data: Data, loss: Loss = nn.functional.cross_entropy) -> ClientApp:
    """A ClientApp that trains and evaluates `model()` on what `data(context)` returns.

    `data` gives the site's training and evaluation examples (the latter may be None): datasets of
    (input, target), or DataLoaders; it is called for each message, so it should cache what is slow.
    `loss(outputs, targets)` returns a scalar. Settings are read from the keys `train.*` of the run
    config, of the site's own node config, which goes before, and of the message's, which goes before both (see
    `TrainSettings`). The batches and torch's random
    numbers follow from the seed, the site and the round: a site's name or partition-id in its node
    config, else Flower's id.

    Replies report `num-examples`, `loss`, `accuracy` (for class scores), `steps` and `seconds`; and
    `participation`, the probability that the site takes part, if its node config says so.
    """
    app = ClientApp()
    made: list[nn.Module] = []  # once in a process; Ray pickles it, so no `cache`

    def fresh_module(seed: int) -> nn.Module:
        """As `model()` made it: what a state dict does not hold goes from no client to the next."""
        if not made:
            made.append(_seeded(model, seed))
        try:
            return deepcopy(made[0])
        except Exception:  # not every module can be copied
            return _seeded(model, seed)

    def prepared(message: Message, context: Context) -> tuple[nn.Module, TrainSettings, int]:
        configs = of_kind(message.content, ConfigRecord)
        settings = TrainSettings.read(context.run_config, context.node_config, *configs)
        server_round = round_of(configs)
        device = choose_device(settings.device)
        module = fresh_module(settings.seed)
        module.load_state_dict(to_state(only_arrays(message.content)))
        _seed_torch(seed_of(settings.seed, site_of(context), server_round), device)
        return module.to(device), settings, server_round

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        module, settings, server_round = prepared(message, context)
        examples, _ = data(context)
        generator = batch_generator(settings.seed, site_of(context), server_round)
        batches = training_batches(examples, settings, generator)
        parameters = dict(module.named_parameters())
        path: list[dict[str, Tensor]] = []  # the model after each batch, if the updates of batches are wanted

        def keep() -> None:
            if settings.batch_updates:
                path.append(_on_cpu(parameters, copy=True))

        keep()
        metrics = train(module, batches, settings, loss, server_round, keep)
        metrics |= _classes(examples) if settings.report_classes else {}
        metrics |= own_metrics(context)
        content = RecordDict(
            {ARRAYS: to_arrays(_on_cpu(module.state_dict())), METRICS: _metrics(count(examples), metrics)}
        )
        if settings.batch_updates:
            content[STEPS] = to_arrays({name: _differences([state[name] for state in path]) for name in parameters})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        module, settings, _ = prepared(message, context)
        _, examples = data(context)
        if examples is None:
            return Message(RecordDict({METRICS: _metrics(0, {})}), reply_to=message)
        metrics = evaluate(module, evaluation_batches(examples), settings, loss)
        return Message(RecordDict({METRICS: _metrics(count(examples), metrics)}), reply_to=message)

    return app


def _seeded(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return model()


def _on_cpu(state: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=copy) for name, tensor in state.items()}


def _differences(states: list[Tensor]) -> Tensor:
    return torch.stack(states).diff(dim=0)


def _classes(examples: Examples) -> dict[str, float]:
    """How many examples of each class there are."""
    data = examples.dataset if isinstance(examples, DataLoader) else examples
    targets = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor([int(t) for _, t in data])  # type: ignore[attr-defined]
    return {f"{CLASS}{c}": float(n) for c, n in enumerate(targets.bincount().tolist()) if n}


def _metrics(examples: int, metrics: Mapping[str, float]) -> MetricRecord:
    return MetricRecord({EXAMPLES: examples, **metrics})


def own_metrics(context: Context) -> dict[str, float]:
    """What a site tells of itself: the probability that it takes part, where its node config says so."""
    node = context.node_config
    return {"participation": float(node["participation"])} if "participation" in node else {}


def only_arrays(content: RecordDict) -> ArrayRecord:
    """The model in a message. Raises `ValueError` unless there is one."""
    records = of_kind(content, ArrayRecord)
    if len(records) != 1:
        raise ValueError(f"The message carries {len(records)} ArrayRecords; send the model in one.")
    return records[0]


def round_of(configs: list[ConfigRecord]) -> int:
    """The round that the server says it is; 1 where it does not."""
    return next((int(cast(int, config[ROUND])) for config in configs if ROUND in config), 1)


def batch_generator(seed: int, site: object, server_round: int) -> torch.Generator:
    """What shuffles a site's examples in a round."""
    return torch.Generator().manual_seed(seed_of(seed, site, server_round, "batches"))


def site_of(context: Context) -> object:
    """What a site's random numbers follow from: its name or partition in its node config, else Flower's id."""
    node = context.node_config
    return node.get("name", node.get("partition-id", context.node_id))


def seed_of(*parts: object) -> int:
    """A seed that follows from `parts`; the run's seed, a site and a round seed torch's own numbers there."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def _seed_torch(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, which takes 0.7 ms because it keeps a stack trace for every device there is not."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
