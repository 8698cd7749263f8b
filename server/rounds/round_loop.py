"""Flower's round loop, which processes replies as they arrive. The methods of the strategy make all decisions."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from corymb.server.rounds.buffered_loop import BufferedLoop
from corymb.server.rounds.codes import BELOW_QUORUM
from corymb.server.rounds.events import Event
from corymb.server.rounds.exchange import Exchange
from corymb.server.rounds.orders import Orders, read_orders
from corymb.server.rounds.record import RoundRecord, as_metrics
from corymb.server.rounds.rejections import Code
from corymb.server.rounds.roster import Sampling, wait_for
from corymb.server.rounds.round import Requests
from corymb.server.rounds.round_journal import RoundJournal, finish_patiently, with_resumable, write_or_keep
from corymb.server.rounds.round_size import ArrivalTimes
from corymb.server.rounds.run_failed import NoReplyAdmitted, QuorumMissed, noted
from corymb.server.rounds.staleness import Asynchrony
from corymb.server.rounds.state import Method, RunState
from corymb.strategies import Model

log = logging.getLogger("flwr.corymb")  # a child of Flower's logger, so that Flower's handlers show its lines
PAUSE_POLL = 1.0  # seconds between two looks at the orders while a run is paused
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds after a round that was abandoned
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class RoundLoop(Strategy):
    """A Flower strategy whose `start()` processes each reply as soon as it arrives.

    The loop calls the methods of Flower's `Strategy`, so a subclass may override any of them. `state` is the current
    state of the run, `record` the record of the current round. Each finished round is written to `journal`, if there
    is one, and `on_round` is called with its record. With `resume`, `start()` goes on from the last round
    in the journal. `timeout` is the limit in seconds for each phase, None for no limit.
    """

    method: Method
    sampling: Sampling
    state: RunState
    record: RoundRecord
    journal: RoundJournal | None
    resume: bool
    busy: frozenset[str]  # the nodes that are not to be asked in the next phase
    connected_before: int | None  # the number of nodes that were connected in the round before; None in the first
    since = 0.0  # the Unix time at which `start` was called
    orders: Orders = Orders()  # of operators, as they were before the present round
    max_abandoned: int
    on_round: Callable[[RoundRecord], None] | None
    timeout: float | None
    asynchrony: Asynchrony | None

    @abstractmethod
    def record_of(self, model: Model) -> ArrayRecord:
        """Return `model` as a record that is sent."""

    @abstractmethod
    def set_model(self, arrays: ArrayRecord) -> ArrayRecord:
        """Make `arrays` the model of the state, unless they are the unchanged record of that model.

        Returns a record that shares the memory of the state's model.
        """

    @abstractmethod
    def sent_model(self) -> ArrayRecord:
        """Return the state's model as a record that shares its memory."""

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Return what must not change when the run is resumed, for the journal."""

    @abstractmethod
    def requests_of(self, messages: list[Message]) -> Requests:
        """Return the requests of the phase that `configure_train` or `configure_evaluate` has begun with `messages`."""

    @abstractmethod
    def set_requests(self, requests: Requests) -> None:
        """Set what has been asked in this phase, so that replies can be matched by message id."""

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
        """Run the rounds.

        The arguments and the result are those of Flower's `Strategy.start`. `timeout` is the limit in seconds for the
        replies of each phase; None means no limit. Raises `NoReplyAdmitted` after the last round if no round
        had admitted replies that it could use, so that the model is the initial one, and `QuorumMissed` after
        `max_abandoned` rounds in a row with fewer admitted replies than the quorum.
        """
        self.summary()
        self.since = time.time()
        if self.journal is not None:
            self.journal.begin(self.about(), self.resume)
            plan = {"rounds": num_rounds, "deadline": timeout or 0, "quorum": self.method.quorum}
            plan["sites-to-begin"] = self.sampling.min_nodes
            self.journal.note({key: str(value) for key, value in plan.items()})  # which pages show
        self.timeout = timeout
        result = Result(arrays=self.set_model(initial_arrays))
        del initial_arrays  # frees the second copy of the model
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if self.journal is not None and self.resume:
            self._restore(self.journal, result)
        if not self.state.round and evaluate_fn and (metrics := evaluate_fn(0, result.arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = metrics
        if self.asynchrony is not None:
            loop = BufferedLoop(self, grid, self.asynchrony)
            return loop.run(num_rounds, result, train_config, evaluate_fn)
        if self.state.round < num_rounds:
            self.await_nodes(grid, self.state.round + 1)
        exchange = Exchange(grid, timeout, self.journal.asks if self.journal is not None else None)
        started, abandoned = time.monotonic(), 0
        for number in range(self.state.round + 1, num_rounds + 1):
            started += self.await_orders(number)
            if self.orders.stopped_by:
                log.info("%s has stopped the run after round %d.", self.orders.stopped_by, number - 1)
                break
            self.record = RoundRecord(number)
            self.busy = exchange.busy(number)
            config = exchange.begin(number, "train", with_resumable(train_config, self.journal))
            messages = list(self.configure_train(number, result.arrays, config, grid))
            trained = self._train(exchange, number, messages, result)
            self.busy = exchange.busy(number)
            config = exchange.begin(number, "evaluate", evaluate_config)
            messages = list(self.configure_evaluate(number, result.arrays, config, grid))
            self.set_requests(exchange.push(messages, self.requests_of))
            evaluated = self.aggregate_evaluate(number, exchange.replies())
            exchange.judged(self.record.evaluations)
            server = evaluate_fn(number, result.arrays) if evaluate_fn else None
            _add_metrics(result, number, trained, evaluated, server)
            ended = time.monotonic()  # the time to write this round to the journal counts for the next round
            self.record = replace(
                self.record, train=_numbers(trained), evaluate=_numbers(evaluated), server=_numbers(server),
                seconds=ended - started,
            )  # fmt: skip
            started = ended
            self._finish(num_rounds)
            abandoned = abandoned + 1 if BELOW_QUORUM in self.record.notes else 0
            if abandoned >= self.max_abandoned:
                raise noted(QuorumMissed(abandoned, self.record), self.journal)
            if abandoned and number < num_rounds:  # the sites that are away may need some time
                time.sleep(min(FIRST_PAUSE * 2 ** (abandoned - 1), LONGEST_PAUSE))
        if self.journal is not None and not self.orders.stopped_by:  # a run that was stopped can go on
            finish_patiently(self.journal)
        if self.state.cost.messages and not self.state.cost.admitted:
            raise noted(NoReplyAdmitted(num_rounds, self.record), self.journal)
        return result

    def await_nodes(self, grid: Grid, number: int) -> None:
        """Wait for the nodes that the first round needs; return early if an operator stops the run."""

        def is_stopped() -> bool:
            self.await_orders(number)
            return bool(self.orders.stopped_by)

        wait_for(grid, self.sampling.min_nodes, self.sampling.timeout, is_stopped)

    def await_orders(self, number: int) -> float:
        """Read the orders of operators before round `number`, and wait while the run is paused. Returns the seconds."""
        if self.journal is None or self.journal.asks is None:
            return 0.0
        began = time.monotonic()
        while True:
            known, self.orders = len(self.orders.all), read_orders(self.journal.folder)
            for order in self.orders.all[known:]:
                log.info("[ROUND %d] %s orders: %s %s", number, order.by, order.action, order.site)
                event = Event(number, "order", order.site, order.action, detail=f"by {order.by}", at=order.at)
                if order.at > self.since:  # an earlier process has noted the others
                    self.journal.asks.note_event(event)
            if not self.orders.paused_by or self.orders.stopped_by:
                return time.monotonic() - began
            time.sleep(PAUSE_POLL)

    def _train(self, exchange: Exchange, number: int, messages: list[Message], result: Result) -> MetricRecord | None:
        """Send `messages`, aggregate the replies, and put the new model into `result`."""
        requests = exchange.push(messages, self.requests_of)
        self.set_requests(requests)
        size, enough = self.method.round_size, None
        if size is not None and requests.by_message:
            enough, estimates = size.choose(len(requests.by_message), self.state.round_size)
            self.state = replace(self.state, round_size=estimates)
        arrival_times = ArrivalTimes(exchange.durations)
        arrays, metrics = self.aggregate_train(number, arrival_times.watch(exchange.replies(enough)))
        exchange.judged(self.record.verdicts)
        result.arrays = self.set_model(result.arrays if arrays is None else arrays)
        if size is not None:
            self.state = replace(self.state, round_size=size.after(arrival_times.seconds, self.state.round_size))
            self.record = replace(self.record, notes={**self.record.notes, "waited-for": float(enough or 0)})
        return metrics

    def _finish(self, num_rounds: int) -> None:
        """Write the round to the journal, log a summary and call `on_round`."""
        record = self.record
        if self.journal is not None:
            write_or_keep(self.journal, record, self.state)
        measured = record.server or record.evaluate or record.train
        counts = record.round, num_rounds, len(record.admitted), len(record.verdicts)
        numbers = " ".join(f"{name} {value:.4f}" for name, value in measured.items())
        log.info("[ROUND %d/%d] replies of %d of %d nodes admitted in %.2f s %s", *counts, record.seconds, numbers)
        if self.on_round is not None:
            self.on_round(record)

    def _restore(self, journal: RoundJournal, result: Result) -> None:
        """Go on from the state in `journal`, and put the rounds that it holds into `result`."""
        self.state = journal.resume(self.state)
        if not self.state.round:
            return
        log.info("Resuming after round %d.", self.state.round)
        result.arrays = self.sent_model()
        for record in journal.rounds():
            metrics = (as_metrics(measured) for measured in (record.train, record.evaluate, record.server))
            _add_metrics(result, record.round, *metrics)
            self.record = record
        self.connected_before = sum(verdict.code != Code.OFFLINE for verdict in self.record.verdicts)


def _add_metrics(result: Result, number: int, *metrics: MetricRecord | None) -> None:
    """Put the metrics of a round into `result`: of the training, of the evaluation, of the server's own test."""
    histories = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp, result.evaluate_metrics_serverapp)
    for record, history in zip(metrics, histories, strict=True):
        if record is not None:
            history[number] = record


def _numbers(metrics: MetricRecord | None) -> dict[str, float]:
    """Return the numbers in `metrics`, those in a list as `name[i]`."""
    numbers: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        if isinstance(value, list):
            numbers |= {f"{name}[{index}]": float(number) for index, number in enumerate(value)}
        else:
            numbers[name] = float(value)
    return numbers
