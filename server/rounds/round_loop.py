"""Flower's round loop over a grid, with replies taken as they arrive. All decisions are those of the strategy."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from corymb.server.rounds.arrivals import arrivals
from corymb.server.rounds.record import RoundRecord
from corymb.server.rounds.requests import push
from corymb.server.rounds.state import Method, RunState

log = logging.getLogger("flwr.corymb")  # under Flower's logger, so that its handlers show it
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class KeepsRounds(Protocol):
    """Where rounds are written down; see `Journal`."""

    def require_empty(self) -> None:
        """Raise `ValueError` if a run has been written here."""

    def write(self, record: RoundRecord, state: RunState) -> None:
        """Write a finished round with the state after it."""


class RoundLoop(Strategy):
    """A Flower strategy that keeps what a run has reached in `state`, and streams under this `start()`.

    The loop calls Flower's own methods, so a subclass may override any of them. `record` is that of the round that is
    under way; with a `journal`, each round is committed there; `on_round` is called with every finished round's record.
    """

    method: Method
    state: RunState
    record: RoundRecord
    journal: KeepsRounds | None
    on_round: Callable[[RoundRecord], None] | None
    timeout: float | None

    @abstractmethod
    def take(self, arrays: ArrayRecord) -> ArrayRecord:
        """Make `arrays` the state's model, unless they hold it, unchanged; a record that shares the model's memory."""

    @abstractmethod
    def sent(self, messages: Iterable[Message]) -> None:
        """Take note that the `messages` of a phase have been pushed; replies are told by their ids."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Flower's round loop.

        Arguments and result as in Flower's; `timeout` is for each phase, None waits for ever.
        """
        self.summary()
        if self.journal is not None:
            self.journal.require_empty()
        self.timeout = timeout
        result = Result(arrays=self.take(initial_arrays))
        del initial_arrays  # so that no second copy of the model stays
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if evaluate_fn and (metrics := evaluate_fn(0, result.arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = metrics
        started = time.monotonic()
        for number in range(1, num_rounds + 1):
            self.record = RoundRecord(number)
            messages = list(self.configure_train(number, result.arrays, train_config, grid))
            trained = self._train(grid, number, messages, result)
            messages = list(self.configure_evaluate(number, result.arrays, evaluate_config, grid))
            replies = arrivals(grid, self._push(grid, messages), timeout)
            evaluated = self.aggregate_evaluate(number, replies)
            server = evaluate_fn(number, result.arrays) if evaluate_fn else None
            for metrics, kept in (
                (trained, result.train_metrics_clientapp),
                (evaluated, result.evaluate_metrics_clientapp),
                (server, result.evaluate_metrics_serverapp),
            ):
                if metrics is not None:
                    kept[number] = metrics
            ended = time.monotonic()  # what is written down of a round is part of the next one's time
            self.record = replace(
                self.record, evaluate=_numbers(evaluated), server=_numbers(server), seconds=ended - started
            )
            started = ended
            self._finish(num_rounds)
        return result

    def _train(self, grid: Grid, number: int, messages: list[Message], result: Result) -> MetricRecord | None:
        """Send `messages`, and take what comes back; the new model goes into `result`."""
        sent = self._push(grid, messages)
        size, enough = self.method.round_size, None
        if size is not None and sent:
            enough, learnt = size.choose(len(sent), self.state.round_size)
            self.state = replace(self.state, round_size=learnt)
        arrived = _Arrived()
        arrays, metrics = self.aggregate_train(number, arrived.watch(arrivals(grid, sent, self.timeout, enough)))
        result.arrays = self.take(result.arrays if arrays is None else arrays)
        if size is not None:
            self.state = replace(self.state, round_size=size.after(arrived.seconds, self.state.round_size))
            self.record = replace(self.record, notes={**self.record.notes, "waited-for": float(enough or 0)})
        return metrics

    def _push(self, grid: Grid, messages: list[Message]) -> dict[str, Message]:
        taken = push(grid, messages)
        self.sent(messages)
        return taken

    def _finish(self, num_rounds: int) -> None:
        """Commit the round, and say what became of it."""
        record = self.record
        if self.journal is not None:
            self.journal.write(record, self.state)
        measured = record.server or record.evaluate or record.train
        log.info(
            "[ROUND %d/%d] %d of %d counted in %.2f s %s",
            record.round,
            num_rounds,
            len(record.admitted),
            len(record.verdicts),
            record.seconds,
            " ".join(f"{name} {value:.4f}" for name, value in measured.items()),
        )
        if self.on_round is not None:
            self.on_round(record)


@dataclass
class _Arrived:
    """When the replies of a phase came, in seconds after they were asked for; errors do not count."""

    started: float = field(default_factory=time.monotonic)
    seconds: list[float] = field(default_factory=list)

    def watch(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The same replies, as they come."""
        for reply in replies:
            if not reply.has_error():
                self.seconds.append(time.monotonic() - self.started)
            yield reply
            del reply


def _numbers(metrics: MetricRecord | None) -> dict[str, float]:
    return {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, (int, float))}
