"""The client app of a simulation that trains the clients of a push together, in blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.client.app import model_record, participation_metric, round_of
from corymb.protocol.codec import to_state
from corymb.protocol.flower import unchecked_metrics, unchecked_record, unchecked_reply
from corymb.protocol.records import ARRAYS, EXAMPLES, EXTRA, METRICS, of_kind, resumable_rounds
from corymb.protocol.row_arrays import ModelRow
from corymb.protocol.train_settings import PREFIX
from corymb.simulations.data.clients import Client, IndexedReplies, Request
from corymb.simulations.data.population import Population
from corymb.simulations.engine.blocks import MatrixBlock, Task, cut_into_blocks
from corymb.simulations.engine.engine import Engine, Outcome, obstacle
from corymb.simulations.engine.kept import Kept, KeptByClients
from corymb.simulations.engine.work import work_of
from corymb.strategies import Layout
from corymb.strategies.core.layout import Role

log = logging.getLogger("flwr.corymb")
Requests = Sequence[Request]


@dataclass(eq=False)  # groups compare by identity: two groups with equal models remain two
class _Group:
    """Clients of a push that train the same model with the same settings; `numbers` index their requests."""

    arrays: ArrayRecord
    settings: TrainSettings
    server_round: int
    trains_alone: bool  # because no engine supports the settings
    second: Mapping[str, Tensor]  # the rule's second vector, by parameter name
    kept: Kept | None
    numbers: list[int] = field(default_factory=list)

    def has_settings_of(self, other: _Group) -> bool:
        """Return whether both groups train with the same settings, whatever their models."""
        return (self.settings, self.server_round) == (other.settings, other.server_round)


class CohortApp:
    """A client app that trains all clients of a push together on `engine`.

    `single_app` handles one message at a time: evaluation, training with settings that no engine supports, and the
    clients of a block that failed. A large enough push is cut into at least `blocks` blocks. `model` makes the clients'
    module.
    """

    def __init__(
        self,
        engine: Engine,
        population: Population,
        layout: Layout,
        single_app: Client,
        blocks: int,
        model: Callable[[], nn.Module],
    ) -> None:
        self._engine, self._population, self._layout, self._single_app = engine, population, layout, single_app
        self._blocks, self._model, self._kept = blocks, model, KeptByClients(model, layout)
        self._buffers = [entry.name for entry in layout.entries if entry.role is not Role.PARAMETER]
        self._work: int | None = None  # of an example, once it is needed
        self._logged: set[str] = set()  # lines that were logged, because each is logged once

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply to one message."""
        return self._single_app(message, context)

    def train_together(self, requests: Requests) -> IndexedReplies:
        """See `CohortTrainer`."""
        groups, alone = self._groups(requests)
        single = [g for g in groups if len(g.numbers) == 1 and g.kept is None] if len(groups) > 1 else []
        shared = [group for group in groups if group not in single]
        # Begin to train the first group now, before the caller reads the first reply.
        first = self._train_group(requests, shared[0]) if shared else iter(())
        return self._all_replies(requests, first, shared, single, alone)

    def _all_replies(
        self,
        requests: Requests,
        first: Iterator[Outcome],
        shared: list[_Group],
        single: list[_Group],
        alone: list[int],
    ) -> IndexedReplies:
        started = time.perf_counter()
        for number, group in enumerate(shared):
            outcomes = self._train_group(requests, group) if number else first
            yield from self._replies(requests, outcomes, started, group.kept)
        while single:
            like_first = [group for group in single if group.has_settings_of(single[0])]
            single = [group for group in single if not group.has_settings_of(like_first[0])]
            yield from self._replies(requests, self._train_own_starts(requests, like_first), started)
        for number in alone:
            yield number, self._reply_alone(*requests[number])

    def _groups(self, requests: Requests) -> tuple[list[_Group], list[int]]:
        """Return the groups of clients that can train in blocks, and the numbers of the other requests."""
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
                        self._log_once(f"Clients train one after another because {reason}.")
                    extra = message.content.get(EXTRA)
                    second = to_state(extra) if isinstance(extra, ArrayRecord) else {}
                    arrays, server_round = model_record(message.content), round_of(configs)
                    kept = self._kept.of(settings, to_state(arrays), resumable_rounds(configs))
                    groups[key] = _Group(arrays, settings, server_round, reason is not None, second, kept)
                except ValueError:
                    alone.append(number)  # the single app raises the same error, which becomes the client's reply
                    continue
            (alone if groups[key].trains_alone else groups[key].numbers).append(number)
        return [group for group in groups.values() if group.numbers], alone

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            log.warning("%s", line)
            self._logged.add(line)

    def _train_group(self, requests: Requests, group: _Group) -> Iterator[Outcome]:
        state = to_state(group.arrays)
        tasks = self._tasks(requests, group.numbers, group)
        if buffers := {name: state[name].numpy() for name in self._buffers if name in state}:
            tasks = [replace(task, buffers=buffers) for task in tasks]
        if (kept := group.kept) is not None:
            contexts = [[requests[number][1] for number in task.requests] for task in tasks]
            tasks = [replace(t, kept=kept.for_clients(own)) for t, own in zip(tasks, contexts, strict=True)]
            state = {**{name: torch.from_numpy(values) for name, values in kept.personal.items()}, **state}
        second = self._layout.vector({**state, **group.second}) if group.second else None
        return self._engine.train(tasks, self._layout.vector(state), second)

    def _train_own_starts(self, requests: Requests, groups: list[_Group]) -> Iterator[Outcome]:
        """Train groups of one client each, which have the same settings and different models."""
        arrays = {group.numbers[0]: group.arrays for group in groups}
        tasks = []
        for task in self._tasks(requests, list(arrays), groups[0]):
            states = [to_state(arrays[number]) for number in task.requests]
            buffers = {name: torch.stack([state[name] for state in states]).numpy() for name in self._buffers}
            starts = torch.stack([self._layout.vector(state) for state in states])
            tasks.append(replace(task, buffers=buffers, starts=starts.numpy()))
        return self._engine.train(tasks, self._layout.vector(to_state(groups[0].arrays)))

    def _tasks(self, requests: Requests, numbers: list[int], group: _Group) -> list[Task]:
        """Cut the clients of the requests with these `numbers` into blocks, with the settings of `group`."""
        clients = [int(requests[number][1].node_config["partition-id"]) for number in numbers]
        sizes = [self._population.size(client) for client in clients]
        if self._work is None:
            with torch.random.fork_rng(devices=[]):
                self._work = work_of(self._model(), self._population.store.inputs_at(slice(0, 2)).cpu())
        return [
            Task(
                tuple(numbers[index] for index in block),
                tuple(clients[index] for index in block),
                group.settings,
                group.server_round,
            )
            for block in cut_into_blocks(sizes, group.settings, self._layout.num_parameters, self._blocks, self._work)
        ]

    def _replies(
        self, requests: Requests, outcomes: Iterator[Outcome], started: float, kept: Kept | None = None
    ) -> IndexedReplies:
        """Yield the number of each request and its reply; the models stay in their block until they are read."""
        for task, block, report in outcomes:
            if isinstance(block, Exception) or report is None:
                # The data of one client may be the cause, so each client trains alone.
                self._log_once(f"The clients of a block train one after another because the block failed: {block}")
                yield from ((number, self._reply_alone(*requests[number])) for number in task.requests)
                continue
            layout = self._layout
            if kept is not None and kept.personal and isinstance(block, MatrixBlock):
                layout = kept.shared_layout(self._layout)
                block = MatrixBlock(block.models[:, kept.shared_columns(self._layout)], layout)
            seconds = (time.perf_counter() - started) / len(task.requests)
            started = time.perf_counter()
            rows = zip(task.requests, report.losses, report.examples, report.steps, report.bounds, strict=True)
            for index, (number, loss, examples, steps, bound) in enumerate(rows):
                message, context = requests[number]
                metrics = unchecked_metrics(
                    {
                        EXAMPLES: self._population.size(task.clients[index]),
                        "loss": loss / examples,
                        **({"accuracy": report.correct[index] / examples} if report.correct is not None else {}),
                        "steps": steps,
                        "seconds": seconds,
                        **(kept.reports(task.server_round, steps) if kept is not None else {}),
                        **participation_metric(context),
                    }
                )
                names = {entry.name for entry in layout.entries}
                buffers = {n: torch.from_numpy(v)[index] for n, v in report.buffers.items() if n in names}
                arrays = ModelRow(block, index, layout, bound).to_record(buffers)
                yield number, unchecked_reply(message, content=unchecked_record({ARRAYS: arrays, METRICS: metrics}))
            del block, arrays  # frees their memory for the next block

    def _reply_alone(self, message: Message, context: Context) -> Message | Exception:
        try:
            return self._single_app(message, context)
        except Exception as error:
            return error
