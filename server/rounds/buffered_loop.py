"""The asynchronous loop: the model changes after a number of replies, and no client waits for others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from corymb.protocol.grids import TimedGrid
from corymb.server.rounds.arrivals import polled
from corymb.server.rounds.conclude import conclude
from corymb.server.rounds.record import log_reasons
from corymb.server.rounds.requests import Phase, push
from corymb.server.rounds.roster import connected as connected_nodes
from corymb.server.rounds.roster import is_complete
from corymb.server.rounds.round import Requests, Round
from corymb.server.rounds.round_journal import finish_patiently, with_resumable, write_or_keep
from corymb.server.rounds.run_failed import NoReplyAdmitted, RunFailed, noted
from corymb.server.rounds.staleness import Asynchrony, Start
from corymb.strategies import Model

log = logging.getLogger("flwr.corymb")
IDLE_SECONDS = 1.0  # between two looks for a node that can be asked
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class _Asked:
    """A node that trains: its name, the version of the model that it began from, and the bytes of the message."""

    name: str
    version: int
    bytes_down: int


@dataclass
class BufferedLoop:
    """Runs `strategy` without rounds over `grid`; each version of the model counts as a round in the records."""

    strategy: Any  # the RoundLoop that makes this loop
    grid: Grid
    asynchrony: Asynchrony
    _asked: dict[str, _Asked] = field(default_factory=dict)  # by message id
    _models: dict[int, Model] = field(default_factory=dict)  # the versions that replies may refer to
    _sent: dict[str, Message] = field(default_factory=dict)  # the messages under way
    _waiting: dict[str, None] = field(default_factory=dict)  # their ids
    _arrivals: Iterator[Message] = field(default_factory=lambda: iter(()))
    _idle_since: float | None = None  # since when no node can be asked, in time.monotonic()
    _too_stale: int = 0  # replies that did not count, since the last version

    def run(self, versions: int, result: Result, config: ConfigRecord, evaluate_fn: EvaluateFn | None) -> Result:
        """Run until the model has changed `versions` times."""
        strategy = self.strategy
        if strategy.state.round < versions:
            strategy.await_nodes(self.grid, strategy.state.round + 1)
        started = time.monotonic()
        while strategy.state.round < versions:
            number = strategy.state.round + 1
            started += strategy.await_orders(number)
            if strategy.orders.stopped_by:
                log.info("%s has stopped the run after version %d.", strategy.orders.stopped_by, number - 1)
                break
            self._models[number] = strategy.state.model
            requests, starts, replies = self._collect(number, with_resumable(config, strategy.journal))
            if not replies and strategy.orders.stopped_by:
                continue
            if not replies:
                raise noted(self._no_more_replies(number), strategy.journal)
            asked = Round(number, strategy.method, requests, starts, self.asynchrony)
            strategy.state, strategy.record = conclude(strategy.state, asked, replies)
            log_reasons(strategy.record.verdicts, "")
            result.arrays = strategy.record_of(strategy.state.model)
            server = evaluate_fn(number, result.arrays) if evaluate_fn else None
            if server is not None:
                result.evaluate_metrics_serverapp[number] = server
            numbers = {name: float(value) for name, value in (server or {}).items() if isinstance(value, (int, float))}
            ended = time.monotonic()
            notes = {**strategy.record.notes, **({"too-stale": self._too_stale} if self._too_stale else {})}
            strategy.record = replace(strategy.record, server=numbers, seconds=ended - started, notes=notes)
            started, self._too_stale = ended, 0
            if strategy.journal is not None:
                write_or_keep(strategy.journal, strategy.record, strategy.state)
            if strategy.on_round is not None:
                strategy.on_round(strategy.record)
            used = {asked.version for asked in self._asked.values()}
            self._models = {version: model for version, model in self._models.items() if version in used}
        if strategy.journal is not None and not strategy.orders.stopped_by:  # a run that was stopped can go on
            finish_patiently(strategy.journal)
        if strategy.state.cost.messages and not strategy.state.cost.admitted:
            raise noted(NoReplyAdmitted(versions, strategy.record), strategy.journal)
        return result

    def _no_more_replies(self, number: int) -> RunFailed:
        record = self.strategy.record
        if not self.strategy.state.cost.admitted:
            return NoReplyAdmitted(number, record)
        return RunFailed(
            f"No client has sent a reply that counts for version {number}, so the run ends with the model of version "
            f"{number - 1}."
        )

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
            self._ask(number, config, connected, set(starts))
            found = self._next_reply()
            if found is None and not self._may_wait(number):
                break
            if found is None:
                continue
            self._idle_since = None
            message_id, reply = found
            asked = self._asked.pop(message_id)
            staleness = number - asked.version
            if staleness > self.asynchrony.max_staleness:
                self._too_stale += 1
                continue
            by_message[message_id], down[asked.name] = asked.name, asked.bytes_down
            starts[asked.name] = Start(self._models[asked.version], staleness)
            replies.append(reply)
            good += not reply.has_error()
        return Requests(by_message, tuple(starts), connected, down), starts, replies

    def _may_wait(self, number: int) -> bool:
        """Wait for a moment, if a node may become idle that can be asked. Raises `TimeoutError` after a long time."""
        strategy = self.strategy
        if is_complete(self.grid) or strategy.orders.stopped_by:
            return False
        if self._idle_since is None:
            self._idle_since = time.monotonic()
            log.info("No node can be asked; waiting for one.")
        timeout = strategy.sampling.timeout
        if time.monotonic() - self._idle_since > timeout:
            raise TimeoutError(f"No node could be asked for {timeout:.0f} s; start the missing nodes.")
        time.sleep(IDLE_SECONDS)
        self._idle_since += strategy.await_orders(number)
        return True

    def _next_reply(self) -> tuple[str, Message] | None:
        """Return the next reply by its message id, an error in place of an unreadable one; None if none will come."""
        if isinstance(self.grid, TimedGrid):
            return self.grid.next_arrival()
        if not self._waiting:
            return None
        reply = next(self._arrivals, None)
        if reply is None:  # it has ended because nothing was under way for a while
            self._arrivals = polled(self.grid, self._sent, self._waiting, inf)
            reply = next(self._arrivals)
        message_id = reply.metadata.reply_to_message_id
        del self._sent[message_id]
        return message_id, reply

    def _ask(self, number: int, config: ConfigRecord, connected: dict[int, str], buffered: set[str]) -> None:
        """Ask idle nodes, drawn by the seed, until as many train as may train at a time."""
        strategy = self.strategy
        state, method = strategy.state, strategy.method
        busy = {asked.name for asked in self._asked.values()} | buffered
        busy |= set(state.guard.quarantined(number)) | strategy.orders.excluded
        idle = {name: node_id for node_id, name in connected.items() if name not in busy}
        free = self.asynchrony.concurrency - len(self._asked)
        if free <= 0 or not idle:
            return
        draw = Random(f"{method.seed}/{number}/{len(buffered)}/async")
        chosen = {name: idle[name] for name in draw.sample(sorted(idle), min(free, len(idle)))}
        second = method.rule.second_vector(state.model.parameters, state.memory)
        extra = None if second is None else strategy.record_of(replace(state.model, parameters=second))
        names = {name: node_id for node_id, name in connected.items()}
        messages = Phase().begin(
            MessageType.TRAIN, number, config, names, chosen,
            lambda name: method.rule.model_for(name, state.model, state.memory), strategy.record_of, extra,
        )  # fmt: skip
        sent = push(self.grid, messages)
        requests = Requests.of(messages, connected)
        for message_id, message in sent.items():
            name = requests.by_message[message_id]
            self._asked[message_id] = _Asked(name, number, requests.bytes_down[name])
            if not isinstance(self.grid, TimedGrid):  # which keeps them itself
                self._sent[message_id], self._waiting[message_id] = message, None
