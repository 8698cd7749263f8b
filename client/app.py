"""A Flower ClientApp made from a model function, a data function and a loss."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from corymb.client.batches import Batch, Examples, count, evaluation_batches, size, training_batches
from corymb.client.device import choose_device
from corymb.client.memory import answer_from_memory
from corymb.client.trainer import Loss, evaluate, train
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import ARRAYS, DEADLINE, EXAMPLES, METRICS, ROUND, STEPS, of_kind
from corymb.protocol.train_settings import TrainSettings
from corymb.strategies.core.reply import CLASS_COUNT_PREFIX

TRAINING_SHARE = 0.8  # of the time until the deadline; the rest is for the upload
Data = Callable[[Context], tuple[Examples, Examples | None]]


def make_client_app(model: Callable[[], nn.Module], data: Data, loss: Loss = nn.functional.cross_entropy) -> ClientApp:
    """Return a ClientApp that trains and evaluates `model()` on the examples that `data(context)` returns.

    `data` returns the client's training and evaluation examples; the latter may be None. Both are datasets of
    (input, target), or DataLoaders. The app calls `data` for each message, so `data` should cache slow work.
    `loss(outputs, targets)` returns a scalar. Examples may also be (input, input, ..., target), for a module with
    several inputs, or dicts: the module then gets the entries as keyword arguments, and the loss is called with the
    outputs and the dict. Outputs may be anything that the loss takes.

    The app reads its settings from the keys `train.*` of the run config, the client's node config and the message's
    config; a later one overrides an earlier one (see `TrainSettings`). The order of the batches and torch's random
    numbers depend on the seed, the client and the round only. The client is identified by `name` or `partition-id` in
    its node config, else by Flower's node id.

    If a message has a `deadline`, the client trains until 80 % of that time and then sends what it has, with the share
    of its training that is done as the metric `completed`. A request that is repeated is answered from memory; see
    `answer_from_memory`.

    Replies to training messages report the metrics `num-examples`, `loss`, `accuracy` (for class scores), `steps` and
    `seconds`. They also report `participation`, the probability that the client takes part in a round, if its node
    config has that key. Replies to evaluation messages report the same, without `steps` and `participation`.
    """
    app = ClientApp(mods=[answer_from_memory])
    initial: list[nn.Module] = []  # at most one, made once per process; Ray cannot pickle `functools.cache`

    def fresh_module(seed: int) -> nn.Module:
        """Return a module in its initial state, so that clients share no state outside of the state dict."""
        if not initial:
            initial.append(_make_seeded(model, seed))
        try:
            return deepcopy(initial[0])
        except Exception:  # some modules cannot be copied
            return _make_seeded(model, seed)

    def prepare(message: Message, context: Context) -> tuple[nn.Module, TrainSettings, int]:
        configs = of_kind(message.content, ConfigRecord)
        settings = TrainSettings.read(context.run_config, context.node_config, *configs)
        server_round = round_of(configs)
        device = choose_device(settings.device)
        module = fresh_module(settings.seed)
        module.load_state_dict(to_state(model_record(message.content)))
        _seed_torch(derive_seed(settings.seed, client_identity(context), server_round), device)
        return module.to(device), settings, server_round

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        module, settings, server_round = prepare(message, context)
        examples, _ = data(context)
        generator = batch_generator(settings.seed, client_identity(context), server_round)
        batches = training_batches(examples, settings, generator, has_batch_norm(module))
        parameters = dict(module.named_parameters())
        states: list[dict[str, Tensor]] = []  # with batch_updates: the parameters at the start and after each batch

        def record_state() -> None:
            if settings.batch_updates:
                states.append(_on_cpu(parameters, copy=True))

        record_state()
        seen = _Seen(batches, seconds_left(message))
        metrics = train(module, seen, settings, loss, server_round, record_state)
        if seen.was_cut:
            metrics |= completed_share(examples, seen, settings)
        metrics |= _class_counts(examples) if settings.report_classes else {}
        metrics |= participation_metric(context)
        used = _used(examples, seen, settings)
        content = RecordDict({ARRAYS: to_arrays(_on_cpu(module.state_dict())), METRICS: _metrics(used, metrics)})
        if settings.batch_updates:
            content[STEPS] = to_arrays({name: _differences([state[name] for state in states]) for name in parameters})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        module, settings, _ = prepare(message, context)
        _, examples = data(context)
        if examples is None:
            return Message(RecordDict({METRICS: _metrics(0, {})}), reply_to=message)
        seen = _Seen(evaluation_batches(examples))
        metrics = evaluate(module, seen, settings, loss)
        return Message(RecordDict({METRICS: _metrics(seen.examples, metrics)}), reply_to=message)

    return app


@dataclass
class _Seen:
    """Batches until `seconds` have passed, but at least one; and the number of batches and examples that were read."""

    batches: Iterable[Batch]
    seconds: float = inf
    number: int = 0
    examples: int = 0
    was_cut: bool = False

    def __iter__(self) -> Iterator[Batch]:
        ends = time.monotonic() + self.seconds
        for batch in self.batches:
            if self.number and time.monotonic() > ends:
                self.was_cut = True
                return
            self.number += 1
            self.examples += size(batch)
            yield batch


def seconds_left(message: Message) -> float:
    """Return for how many seconds a client may train: until `TRAINING_SHARE` of the time to the deadline has passed."""
    deadlines = [record[DEADLINE] for record in of_kind(message.content, ConfigRecord) if DEADLINE in record]
    if not deadlines or not isinstance(deadlines[0], (int, float)):
        return inf
    return TRAINING_SHARE * deadlines[0] - max(0.0, time.time() - message.metadata.created_at)


def completed_share(examples: Examples, seen: _Seen, settings: TrainSettings) -> dict[str, float]:
    """Return how much of its training a client has done, from 0 to 1, as the metric `completed`; nothing if unknown."""
    known = count(examples)
    if settings.steps is not None:
        return {"completed": seen.number / settings.steps}
    return {"completed": seen.examples / (known * (settings.epochs or 1))} if known else {}


def _used(examples: Examples, seen: _Seen, settings: TrainSettings) -> int:
    """Return the number of examples that the client trained on, each counted once."""
    known = count(examples)
    if known is not None:
        return min(known, seen.examples) if seen.was_cut else known
    return seen.examples if settings.steps is not None else seen.examples // (settings.epochs or 1)


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a layer of `module` needs several examples in a training batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def _make_seeded(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return model()


def _on_cpu(state: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=copy) for name, tensor in state.items()}


def _differences(states: list[Tensor]) -> Tensor:
    return torch.stack(states).diff(dim=0)


def _class_counts(examples: Examples) -> dict[str, float]:
    """Return the number of examples of each class, as metrics."""
    data = examples.dataset if isinstance(examples, DataLoader) else examples
    targets = data.tensors[1] if isinstance(data, TensorDataset) else torch.tensor([int(t) for _, t in data])  # type: ignore[attr-defined]
    return {f"{CLASS_COUNT_PREFIX}{c}": float(n) for c, n in enumerate(targets.bincount().tolist()) if n}


def _metrics(examples: int, metrics: Mapping[str, float]) -> MetricRecord:
    return MetricRecord({EXAMPLES: examples, **metrics})


def participation_metric(context: Context) -> dict[str, float]:
    """Return `participation` from the client's node config as a metric; nothing if the key is missing."""
    node = context.node_config
    return {"participation": float(node["participation"])} if "participation" in node else {}


def model_record(content: RecordDict) -> ArrayRecord:
    """Return the model in a message. Raises `ValueError` unless the message has exactly one ArrayRecord."""
    records = of_kind(content, ArrayRecord)
    if len(records) != 1:
        raise ValueError(f"The message has {len(records)} ArrayRecords; send exactly one, with the model.")
    return records[0]


def round_of(configs: list[ConfigRecord]) -> int:
    """Return the round number in the message's configs; 1 if they have none."""
    return next((int(cast(int, config[ROUND])) for config in configs if ROUND in config), 1)


def batch_generator(seed: int, site: object, server_round: int) -> torch.Generator:
    """Return the generator that shuffles a client's examples in a round."""
    return torch.Generator().manual_seed(derive_seed(seed, site, server_round, "batches"))


def client_identity(context: Context) -> object:
    """Return the client's identity in seeds: `name` or `partition-id` in its node config, else Flower's node id."""
    node = context.node_config
    return node.get("name", node.get("partition-id", context.node_id))


def derive_seed(*parts: object) -> int:
    """Return a seed that depends on `parts` only, such as the run's seed, a client and a round."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    `torch.manual_seed` takes 0.7 ms, because it stores a stack trace for every kind of device that is absent.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
