"""The asynchronous loop: the model changes after a number of replies, and no client waits for others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from corymb.protocol.grids import TimedGrid
from corymb.server.rounds.conclude import conclude
from corymb.server.rounds.pulls import pulled
from corymb.server.rounds.record import log_reasons
from corymb.server.rounds.requests import Phase, push
from corymb.server.rounds.roster import connected as connected_nodes
from corymb.server.rounds.round import Requests, Round
from corymb.server.rounds.round_journal import finish_patiently, write_or_keep
from corymb.server.rounds.run_failed import NoReplyAdmitted
from corymb.server.rounds.staleness import Asynchrony, Start
from corymb.strategies import Model

NextReply = Callable[[dict[str, None]], tuple[str, Message] | None]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def next_reply_of(grid: Grid) -> NextReply:
    """Return a function that waits for the next reply to one of some messages."""
    if isinstance(grid, TimedGrid):
        return lambda waiting: grid.next_arrival()

    def wait(waiting: dict[str, None]) -> tuple[str, Message] | None:
        for arrived in pulled(grid, waiting, inf):
            if arrived is not None and isinstance(arrived[1], Message):
                return arrived[0], arrived[1]
        return None

    return wait


@dataclass
class BufferedLoop:
    """Runs `strategy` without rounds over `grid`; each version of the model counts as a round in the records.

    `next_reply(waiting)` returns the next reply to one of the messages that are the keys of `waiting`, or None if there
    will be none. `arrays_of(model)` makes the record of a model that is sent.
    """

    strategy: Any
    grid: Grid
    asynchrony: Asynchrony
    next_reply: NextReply
    arrays_of: Callable[[Model], ArrayRecord]
    seed: int
    _asked: dict[str, tuple[str, int]] = field(default_factory=dict)  # by message id: the node's name and the version
    _models: dict[int, Model] = field(default_factory=dict)  # the versions that replies may refer to
    _phases: dict[str, Requests] = field(default_factory=dict)

    def run(self, versions: int, result: Result, config: ConfigRecord, evaluate_fn: EvaluateFn | None) -> Result:
        """Run until the model has changed `versions` times."""
        strategy, started = self.strategy, time.monotonic()
        while strategy.state.round < versions:
            number = strategy.state.round + 1
            self._models[number] = strategy.state.model
            requests, starts, replies = self._collect(number, config)
            if not replies:
                break
            asked = Round(number, strategy.method, requests, starts, self.asynchrony)
            strategy.state, strategy.record = conclude(strategy.state, asked, replies)
            log_reasons(strategy.record.verdicts, "")
            result.arrays = self.arrays_of(strategy.state.model)
            server = evaluate_fn(number, result.arrays) if evaluate_fn else None
            if server is not None:
                result.evaluate_metrics_serverapp[number] = server
            numbers = {name: float(value) for name, value in (server or {}).items() if isinstance(value, (int, float))}
            ended = time.monotonic()
            strategy.record = replace(strategy.record, server=numbers, seconds=ended - started)
            started = ended
            if strategy.journal is not None:
                write_or_keep(strategy.journal, strategy.record, strategy.state)
            if strategy.on_round is not None:
                strategy.on_round(strategy.record)
            used = {version for _, version in self._asked.values()}
            self._models = {version: model for version, model in self._models.items() if version in used}
        if strategy.journal is not None:
            finish_patiently(strategy.journal)
        if strategy.state.cost.messages and not strategy.state.cost.admitted:
            raise NoReplyAdmitted(versions, strategy.record)
        return result

    def _collect(self, number: int, config: ConfigRecord) -> tuple[Requests, dict[str, Start], list[Message]]:
        """Keep clients busy until the buffer is full; return what was asked, where they began, and the replies."""
        replies: list[Message] = []
        by_message: dict[str, str] = {}
        down: dict[str, int] = {}
        starts: dict[str, Start] = {}
        connected: dict[int, str] = {}
        good = 0
        while good < self.asynchrony.buffer:
            connected = {node_id: name for name, node_id in connected_nodes(self.grid).items()}
            self._ask(number, config, connected, set(by_message.values()))
            found = self.next_reply(dict.fromkeys(self._asked))
            if found is None:
                break
            message_id, reply = found
            name, version = self._asked.pop(message_id)
            staleness = number - version
            if staleness > self.asynchrony.max_staleness:
                continue
            by_message[message_id], starts[name] = name, Start(self._models[version], staleness)
            down |= {name: self._phases[message_id].bytes_down.get(name, 0)}
            replies.append(reply)
            good += not reply.has_error()
        return Requests(by_message, tuple(by_message.values()), connected, down), starts, replies

    def _ask(self, number: int, config: ConfigRecord, connected: dict[int, str], buffered: set[str]) -> None:
        """Ask idle nodes, drawn by the seed, until as many train as may train at a time."""
        busy = {name for name, _ in self._asked.values()} | buffered
        idle = {name: node_id for node_id, name in connected.items() if name not in busy}
        free = self.asynchrony.concurrency - len(self._asked)
        if free <= 0 or not idle:
            return
        draw = Random(f"{self.seed}/{number}/{len(buffered)}/async")
        chosen = {name: idle[name] for name in draw.sample(sorted(idle), min(free, len(idle)))}
        phase, state, rule = Phase(), self.strategy.state, self.strategy.method.rule
        second = rule.second_vector(state.model.parameters, state.memory)
        extra = None if second is None else self.arrays_of(replace(state.model, parameters=second))
        names = {name: node_id for node_id, name in connected.items()}
        messages = phase.begin(
            MessageType.TRAIN, number, config, names, chosen,
            lambda name: rule.model_for(name, state.model, state.memory), self.arrays_of, extra,
        )  # fmt: skip
        sent = push(self.grid, messages)
        requests = Requests.of(messages, connected)
        for message_id in sent:
            self._asked[message_id] = (requests.by_message[message_id], number)
            self._phases[message_id] = requests
