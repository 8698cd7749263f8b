"""Clients that are described by a module and their data, trained in blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor

from corymb.client import TrainSettings
from corymb.client.app import only_arrays, own_metrics, round_of
from corymb.protocol.codec import to_state
from corymb.protocol.flower import quick_metrics, quick_record, quick_reply
from corymb.protocol.records import ARRAYS, EXAMPLES, METRICS, of_kind
from corymb.protocol.row_arrays import ModelRow
from corymb.protocol.train_settings import PREFIX
from corymb.simulations.data.clients import Answers, Client, Request
from corymb.simulations.data.population import Population
from corymb.simulations.engine.blocks import Task, cut
from corymb.simulations.engine.engine import Answered, Engine, obstacle
from corymb.strategies import Layout

log = logging.getLogger("flwr.corymb")
Requests = Sequence[Request]


@dataclass(eq=False)  # by identity: equal models are another matter
class _Group:
    """Those of a push who train the same model in the same way: their numbers among the requests."""

    arrays: ArrayRecord
    settings: TrainSettings
    server_round: int
    is_special: bool  # what no engine trains
    numbers: list[int] = field(default_factory=list)

    def is_like(self, other: _Group) -> bool:
        """Whether both train in the same way, each its own model."""
        return (self.settings, self.server_round) == (other.settings, other.server_round)


class CohortApp:
    """A client app that answers all training messages of a push together.

    `alone` is the app that answers one by itself: to evaluate, for settings that no engine has, and where a block
    fails. `blocks` is how many a push is cut into at least, if it is large enough.
    """

    def __init__(self, engine: Engine, population: Population, layout: Layout, alone: Client, blocks: int) -> None:
        self._engine, self._population, self._layout, self._alone = engine, population, layout, alone
        self._blocks = blocks
        self._logged: set[str] = set()  # lines that were logged

    def __call__(self, message: Message, context: Context) -> Message:
        """One message by itself."""
        return self._alone(message, context)

    def train_together(self, requests: Requests) -> Answers:
        """See `TrainsTogether`."""
        groups, alone = self._groups(requests)
        own = [group for group in groups if len(group.numbers) == 1] if len(groups) > 1 else []
        shared = [group for group in groups if group not in own]
        first = self._trained(requests, shared[0]) if shared else iter(())
        return self._answers(requests, first, shared[1:], own, alone)

    def _answers(
        self, requests: Requests, first: Iterator[Answered], shared: list[_Group], own: list[_Group], alone: list[int]
    ) -> Answers:
        started = time.perf_counter()
        yield from self._replies(requests, first, started)
        for group in shared:
            yield from self._replies(requests, self._trained(requests, group), started)
        while own:
            like = [group for group in own if group.is_like(own[0])]
            own = [group for group in own if not group.is_like(like[0])]
            yield from self._replies(requests, self._trained_own(requests, like), started)
        for number in alone:
            yield number, self._by_itself(*requests[number])

    def _groups(self, requests: Requests) -> tuple[list[_Group], list[int]]:
        """Who trains alike, and who has to train by itself."""
        groups: dict[tuple[int, int], _Group] = {}
        alone = []
        for number, (message, context) in enumerate(requests):
            node = context.node_config if any(key.startswith(PREFIX) for key in context.node_config) else {}
            key = (id(message.content), id(node) if node else 0)
            if key not in groups:
                configs = of_kind(message.content, ConfigRecord)
                try:
                    settings = TrainSettings.read(context.run_config, node, *configs)
                    reason = obstacle(settings, self._engine.device)
                    if reason is not None:
                        self._log(f"Clients are trained one after another, as {reason}.")
                    arrays = only_arrays(message.content)
                    groups[key] = _Group(arrays, settings, round_of(configs), reason is not None)
                except ValueError:
                    alone.append(number)  # where it is told what is wrong
                    continue
            (alone if groups[key].is_special else groups[key].numbers).append(number)
        return [group for group in groups.values() if group.numbers], alone

    def _log(self, line: str) -> None:
        if line not in self._logged:
            log.warning("%s", line)
            self._logged.add(line)

    def _trained(self, requests: Requests, group: _Group) -> Iterator[Answered]:
        return self._engine.train(self._tasks(requests, group.numbers, group), self._vector(group.arrays))

    def _trained_own(self, requests: Requests, groups: list[_Group]) -> Iterator[Answered]:
        arrays = {group.numbers[0]: group.arrays for group in groups}
        for task in self._tasks(requests, list(arrays), groups[0]):
            starts = torch.stack([self._vector(arrays[number]) for number in task.requests])
            yield self._engine.train_own(task, starts)

    def _tasks(self, requests: Requests, numbers: list[int], like: _Group) -> list[Task]:
        """Blocks of the clients of the requests with these `numbers`, to train as `like` says."""
        clients = [int(requests[number][1].node_config["partition-id"]) for number in numbers]
        sizes = [self._population.size(client) for client in clients]
        return [
            Task(
                tuple(numbers[place] for place in block),
                tuple(clients[place] for place in block),
                like.settings,
                like.server_round,
            )
            for block in cut(sizes, like.settings, self._layout.num_parameters, self._blocks)
        ]

    def _vector(self, arrays: ArrayRecord) -> Tensor:
        return self._layout.vector(to_state(arrays))

    def _replies(self, requests: Requests, answered: Iterator[Answered], started: float) -> Answers:
        """The replies of each block, whose models stay where they are until somebody looks at them."""
        for task, block, report in answered:
            if isinstance(block, Exception) or report is None:
                # One client's data may be to blame, so each shows by itself whether it can train.
                self._log(f"A block of clients is trained one by one, as it failed: {block}")
                yield from ((number, self._by_itself(*requests[number])) for number in task.requests)
                continue
            seconds = (time.perf_counter() - started) / len(task.requests)
            started = time.perf_counter()
            rows = zip(
                task.requests, report.losses, report.correct, report.examples, report.steps, report.bounds, strict=True
            )
            for index, (number, loss, correct, examples, steps, bound) in enumerate(rows):
                message, context = requests[number]
                metrics = quick_metrics(
                    {
                        EXAMPLES: self._population.size(task.clients[index]),
                        "loss": loss / examples,
                        "accuracy": correct / examples,
                        "steps": steps,
                        "seconds": seconds,
                        **own_metrics(context),
                    }
                )
                arrays = ModelRow(block, index, self._layout, bound).to_record()
                yield number, quick_reply(message, content=quick_record({ARRAYS: arrays, METRICS: metrics}))
            del block, arrays  # its memory goes to the next

    def _by_itself(self, message: Message, context: Context) -> Message | Exception:
        try:
            return self._alone(message, context)
        except Exception as error:
            return error
