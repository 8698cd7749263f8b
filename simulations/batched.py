"""Many clients trained as one tensor program: their models are stacked, their batches padded and masked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from corymb.client import TrainSettings
from corymb.client.app import batch_generator, only_arrays, round_of
from corymb.client.batches import shuffled_rows
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import ARRAYS, EXAMPLES, METRICS, of_kind

ALONE = (nn.modules.dropout._DropoutNd, nn.RNNBase)  # random, or not to be batched
State = dict[str, Tensor]


class BatchedApp:
    """Trains all clients of a round at once, on the batches that each would take by itself.

    `inputs [n, ...]` and `targets [n]` are everybody's examples and `parts` the rows of each client. Any optimiser of
    torch that treats each number by itself will do. Raises `ValueError` for modules with running
    statistics, dropout, recurrence or shared parameters. Clients with settings of their own train by themselves.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        inputs: Tensor,
        targets: Tensor,
        parts: Sequence[Tensor],
        alone: Callable[[Message, Context], Message],
    ) -> None:
        self._module = model()
        for name, module in self._module.named_modules():
            statistics = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            if statistics or isinstance(module, ALONE):
                raise ValueError(f"engine = 'batched' cannot train {name!r}, a {type(module).__name__}; use 'serial'.")
        every = dict(self._module.named_parameters(remove_duplicate=False))
        if shared := every.keys() - dict(self._module.named_parameters()).keys():
            raise ValueError(f"engine = 'batched' cannot train {min(shared)!r}, shared by two layers; use 'serial'.")
        self._inputs, self._targets, self._parts = inputs, targets, parts
        self._alone = alone

    def __call__(self, message: Message, context: Context) -> Message:
        """One message by itself, as a client app of its own answers it."""
        return self._alone(message, context)

    def together(self, asked: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The replies to training messages of one push."""
        started = time.perf_counter()
        configs = [of_kind(message.content, ConfigRecord) for message, _ in asked]
        settings = [
            TrainSettings.read(context.run_config, context.node_config, *config)
            for (_, context), config in zip(asked, configs, strict=True)
        ]
        first = settings[0]
        plain = first.precision == "float32" and not first.batch_updates and not first.report_classes
        if not plain or len(set(map(repr, settings))) > 1:
            return [self._alone(message, context) for message, context in asked]
        number = round_of(configs[0])
        states = [to_state(only_arrays(message.content)) for message, _ in asked]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        parts = [self._parts[int(context.node_config["partition-id"])] for _, context in asked]
        rows = [
            self._rows(part, settings[0], batch_generator(settings[0].seed, context, number))
            for part, (_, context) in zip(parts, asked, strict=True)
        ]
        losses, correct, seen = self._train(stacked, rows, settings[0], settings[0].rate(number))
        seconds = (time.perf_counter() - started) / len(asked)
        replies = []
        for index, (message, context) in enumerate(asked):
            count = max(1.0, float(seen[index]))
            numbers: dict[str, int | float | list[int] | list[float]] = {
                EXAMPLES: len(parts[index]),
                "loss": float(losses[index]) / count,
                "accuracy": float(correct[index]) / count,
                "steps": len(rows[index]),
                "seconds": seconds,
            }
            if "participation" in context.node_config:
                numbers["participation"] = float(context.node_config["participation"])
            state = {name: tensor[index] for name, tensor in stacked.items()}
            content = RecordDict({ARRAYS: to_arrays(state), METRICS: MetricRecord(numbers)})
            replies.append(Message(content, reply_to=message))
        return replies

    def _rows(self, part: Tensor, settings: TrainSettings, generator: torch.Generator) -> list[Tensor]:
        """The rows of each batch of a client, in the order in which it takes them."""

        def passes() -> Iterator[Tensor]:
            done = 0
            while settings.steps is not None or done < (settings.epochs or 1):
                yield from shuffled_rows(len(part), settings, generator)
                done += 1

        return [part[rows] for rows in islice(passes(), settings.steps)]

    def _train(
        self, state: State, rows: list[list[Tensor]], settings: TrainSettings, rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Train the stacked `state` in place; sums of losses, of correct answers and of examples, `[K]` each."""
        parameters = {name: state[name] for name, p in self._module.named_parameters() if p.requires_grad}
        fixed = {name: tensor for name, tensor in state.items() if name not in parameters}
        optimizer = getattr(torch.optim, settings.optimizer)(
            list(parameters.values()), lr=rate, **settings.optimizer_options
        )

        def loss(
            weights: State, others: State, inputs: Tensor, targets: Tensor, mask: Tensor
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            outputs = functional_call(self._module, {**weights, **others}, (inputs,))
            total = (nn.functional.cross_entropy(outputs, targets, reduction="none") * mask).sum()
            correct = ((outputs.argmax(dim=1) == targets) * mask).sum()
            return total / mask.sum().clamp(min=1), (total.detach(), correct)

        gradients = vmap(grad(loss, has_aux=True))
        sums = torch.zeros(3, len(rows))
        self._module.train()
        for step in range(max(map(len, rows))):
            batches = [client[step] if step < len(client) else client[0][:0] for client in rows]
            size = max(map(len, batches))
            index = torch.stack([nn.functional.pad(batch, (0, size - len(batch))) for batch in batches])
            lengths = torch.tensor([len(batch) for batch in batches])
            mask = (torch.arange(size) < lengths[:, None]).float()
            slopes, (losses, correct) = gradients(parameters, fixed, self._inputs[index], self._targets[index], mask)
            finished = (lengths == 0).nonzero()[:, 0]
            before = [parameter[finished].clone() for parameter in parameters.values()]
            for name, parameter in parameters.items():
                parameter.grad = slopes[name]
            optimizer.step()
            for parameter, old in zip(parameters.values(), before, strict=True):
                parameter[finished] = old  # momentum would carry a client on that has no batches left
            sums += torch.stack([losses, correct.float(), lengths.float()])
        losses, correct, seen = sums
        return losses, correct, seen
