"""A Flower ClientApp made from a model function, a data function and a loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import NamedTuple, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from corymb.client.algorithms.memory_files import folder_of
from corymb.client.batches import Batch, Examples, count, evaluation_batches, training_batches
from corymb.client.device import choose_device
from corymb.client.local_work import LocalWork
from corymb.client.memory import answer_from_memory
from corymb.client.seeds import derive_seed
from corymb.client.seen import Seen, completed_share, seconds_left, used_examples
from corymb.client.tasks.task import Loss, Task, make_task, task_of_loss
from corymb.client.trainer import evaluate
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.compression import COMPRESSION, UPDATE
from corymb.protocol.records import (
    ARRAYS,
    EXAMPLES,
    EXTRA,
    METRICS,
    ROUND,
    STEPS,
    memory_run,
    of_kind,
    resumable_rounds,
)
from corymb.protocol.task_settings import TaskSettings
from corymb.protocol.train_settings import TrainSettings
from corymb.strategies.core.reply import CLASS_COUNT_PREFIX

Data = Callable[[Context], tuple[Examples, Examples | None]]


def make_client_app(model: Callable[[], nn.Module], data: Data, loss: Loss | None = None) -> ClientApp:
    """Return a ClientApp that trains and evaluates `model()` on the examples that `data(context)` returns.

    `data` returns the client's training and evaluation examples; the latter may be None. Both are datasets of
    (input, target), or DataLoaders. The app calls `data` for each message, so `data` should cache slow work.
    `loss(outputs, targets)` returns a scalar; without it, the keys `task.*` of the run config decide (see
    `TaskSettings`), by default classification. Examples may also be (input, input, ..., target), for a module with
    several inputs, or dicts: the module then gets the entries as keyword arguments, and the loss is called with the
    outputs and the dict. Outputs may be anything that the loss takes.

    The app reads its settings from the keys `train.*` and `task.*` of the run config, the client's node config and the
    message's config; a later one overrides an earlier one (see `TrainSettings`). What `train.algorithm` and
    `train.personal` keep at the client lies in files; see `memory_files`. The order of the batches and torch's random
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
    initial: dict[int, nn.Module] = {}  # of the last seed, made once per process; `functools.cache` suits no Ray

    def fresh_module(seed: int) -> nn.Module:
        """Return a module in its initial state, so that clients share no state outside of the state dict."""
        if seed not in initial:
            initial.clear()
            initial[seed] = make_seeded(model, seed)
        try:
            return deepcopy(initial[seed])
        except Exception:  # some modules cannot be copied
            return make_seeded(model, seed)

    def prepare(message: Message, context: Context) -> _Prepared:
        configs = of_kind(message.content, ConfigRecord)
        settings = TrainSettings.read(context.run_config, context.node_config, *configs)
        server_round, identity = round_of(configs), client_identity(context)
        device = choose_device(settings.device)
        task = (
            task_of_loss(loss)
            if loss is not None
            else make_task(TaskSettings.read(context.run_config, context.node_config, *configs))
        )
        module = fresh_module(settings.seed).to(device)
        folder = folder_of(context, identity, memory_run(message.content, context.run_id))
        extra = message.content.get(EXTRA)
        work = LocalWork(
            module, to_state(model_record(message.content)), to_state(extra) if isinstance(extra, ArrayRecord) else {},
            settings, server_round, task, lambda: fresh_module(settings.seed), folder,
            resumable_rounds(configs),
        )  # fmt: skip

        def seeded() -> None:
            _seed_torch(derive_seed(settings.seed, identity, server_round), device)

        seeded()
        return _Prepared(work, module, settings, server_round, task, seeded)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        work, module, settings, server_round, _, seeded = prepare(message, context)
        examples, _ = data(context)
        parameters = dict(module.named_parameters())
        states: list[dict[str, Tensor]] = []  # with batch_updates: the parameters at the start and after each batch

        def record_state() -> None:
            if settings.batch_updates:
                states.append(_on_cpu(parameters, copy=True))

        record_state()
        drawn: list[Seen] = []
        ends = time.monotonic() + seconds_left(message)

        def batches(used: TrainSettings) -> Seen:
            generator = batch_generator(settings.seed, client_identity(context), server_round)
            own = training_batches(examples, used, generator, has_batch_norm(module))
            drawn.append(Seen(own, ends - time.monotonic()))
            return drawn[-1]

        metrics, state, sent, update = work.train(batches, seeded, record_state)
        seen = drawn[-1]  # of the shared model, which is trained last
        if seen.was_cut:
            metrics |= completed_share(examples, seen, settings)
        metrics |= _class_counts(examples) if settings.report_classes else {}
        metrics |= participation_metric(context)
        used = used_examples(examples, seen, settings)
        content = RecordDict({ARRAYS: to_arrays(state), METRICS: _metrics(used, metrics)})
        if settings.compression is not None:
            content[UPDATE] = to_arrays(update)
            content[COMPRESSION] = ConfigRecord(settings.compression.model_dump(exclude_none=True))
        if sent:  # as the update of a single batch, which a rule may ask for
            content[STEPS] = to_arrays({name: tensor[None] for name, tensor in _on_cpu(sent).items()})
        if settings.batch_updates:
            content[STEPS] = to_arrays({name: _differences([state[name] for state in states]) for name in parameters})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        work, module, settings, server_round, task, seeded = prepare(message, context)
        own, examples = data(context)
        if examples is None or not count(examples):
            return Message(RecordDict({METRICS: _metrics(0, {})}), reply_to=message)

        def batches(used: TrainSettings) -> Iterable[Batch]:
            generator = batch_generator(settings.seed, client_identity(context), server_round)
            return training_batches(own, used, generator, has_batch_norm(module))

        seen = Seen(evaluation_batches(examples))
        metrics = evaluate(work.evaluated(batches, seeded), seen, settings, task)
        return Message(RecordDict({METRICS: _metrics(seen.examples, metrics)}), reply_to=message)

    return app


class _Prepared(NamedTuple):
    """A message with what it takes to answer it; `seeded()` seeds torch's generators."""

    work: LocalWork
    module: nn.Module
    settings: TrainSettings
    server_round: int
    task: Task
    seeded: Callable[[], None]


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a layer of `module` needs several examples in a training batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def make_seeded(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a new `model()`, made with torch's generator seeded with `seed`, which keeps its state."""
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
    records = [record for name, record in content.items() if isinstance(record, ArrayRecord) and name != EXTRA]
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


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    `torch.manual_seed` takes 0.7 ms, because it stores a stack trace for every kind of device that is absent.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
