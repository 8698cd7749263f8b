"""A rule as a Flower strategy: right under Flower's own `start()`, streaming under its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import ARRAYS, CONFIG, EXAMPLES, ROUND
from corymb.server.arrivals import arrivals
from corymb.server.asked import Asked
from corymb.server.door import Code, Door, Rejection, is_bounded
from corymb.server.guard import Guard
from corymb.server.journal import Journal
from corymb.server.patience import Patience
from corymb.server.record import RoundRecord, as_metrics, mean_metrics, verdicts
from corymb.server.roster import connected, sample, wait_for
from corymb.strategies import Layout, Model, Proxy, Reply, Report, Rule, Step

log = logging.getLogger("flwr.corymb")  # under Flower's logger, so that its handlers show it
Named = Iterable[tuple[str, Message | Exception]]


class FlowerStrategy(Strategy):
    """Aggregates with `rule`; give it wherever Flower takes a strategy.

    `fraction_train` and `fraction_evaluate` of the connected nodes are asked in a round, drawn from
    `seed` by node name, once `min_available_nodes` have connected (`TimeoutError` after
    `wait_seconds`). Errors, silence and replies that the door turns away cost a round nothing but
    that reply. `step` is a server optimiser after the rule, `proxy` the server's own data, for rules that need
    them. With a `guard` the sites elect each round's model among candidates; `patience` says how many replies a
    round waits for under this `start()`. `buffers` names the float buffers in the state dict (default:
    BatchNorm's statistics).
    With a `journal`, each round is committed there under this `start()`. `on_round` is called with
    every finished round's record.

    A rule's memory and the names of the known nodes live in the strategy: use a new one for a new run.
    """

    def __init__(
        self,
        rule: Rule[Any],
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        wait_seconds: float = 3600.0,
        seed: int = 0,
        buffers: Collection[str] | None = None,
        weighted_by_key: str = EXAMPLES,
        arrayrecord_key: str = ARRAYS,
        configrecord_key: str = CONFIG,
        step: Step | None = None,
        guard: Guard | None = None,
        patience: Patience | None = None,
        proxy: Proxy | None = None,
        journal: Journal | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        for name, fraction in (("fraction_train", fraction_train), ("fraction_evaluate", fraction_evaluate)):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} = {fraction} must lie in [0, 1]; 1 asks every connected node.")
        for each in (rule, *(guard.rules if guard else ())):
            if each.needs_proxy and proxy is None:
                raise ValueError(f"{each} needs data of the server's own; give FlowerStrategy a proxy.")
        self.rule = rule
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_available_nodes = min_available_nodes
        self.wait_seconds = wait_seconds
        self.seed = seed
        self.buffers = buffers
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.step = step
        self.guard = guard
        self.patience = patience
        self.proxy = proxy
        self.journal = journal
        self.on_round = on_round
        self.memory = rule.initial()
        self.moments = step.initial() if step else None
        self.guard_memories = guard.initial() if guard else ()
        self._grid: Grid | None = None
        self._timeout = 3600.0
        self._arrived: list[float] = []  # seconds after the push
        self.known: set[str] = set()
        self._asked = Asked()
        self._config = ConfigRecord()
        self._arrays = ArrayRecord()  # the model as it was last sent, and, taken apart, `_origin`
        self._origin = Model(torch.zeros(0))
        self._layout = Layout(())
        self._door = Door(self._layout)

    def summary(self) -> None:
        """Log the rule and how nodes are chosen."""
        log.info("\t├── Rule: %s", self.rule)
        log.info("\t├── Ask: train %g | evaluate %g", self.fraction_train, self.fraction_evaluate)
        log.info("\t└── Wait for: %d nodes | seed %d", self.min_available_nodes, self.seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """A training message for each sampled node. Neither `arrays` nor `config` is changed."""
        self._take(arrays)
        self._grid = grid
        nodes = wait_for(grid, self.min_available_nodes, self.wait_seconds)
        self.known |= nodes.keys()
        chosen = sample(nodes, self.fraction_train, self.seed, server_round, "train")
        return self._messages(MessageType.TRAIN, server_round, config, {name: nodes[name] for name in chosen})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model and mean metrics after `replies` to `configure_train`; None where nobody counted."""
        if not self._arrays:
            raise RuntimeError("aggregate_train needs the round's model: call configure_train before it.")
        record = RoundRecord(server_round)
        arrays = self._aggregate(record, self._asked.in_order(replies)) or (self._arrays if record.admitted else None)
        return arrays, as_metrics(record.train)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """An evaluation message for each sampled node."""
        self._take(arrays)
        nodes = connected(grid) if self.fraction_evaluate else {}
        chosen = sample(nodes, self.fraction_evaluate, self.seed, server_round, "evaluate")
        return self._messages(MessageType.EVALUATE, server_round, config, {name: nodes[name] for name in chosen})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean metrics of `replies`, weighed by examples."""
        return as_metrics(self._hear(self._asked.in_order(replies)))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's round loop, with replies folded as they arrive. Arguments and result as in Flower's."""
        self.summary()
        if self.journal is not None:
            self.journal.require_empty()
        self._timeout = timeout
        self._take(initial_arrays)
        del initial_arrays  # what is sent from here on shares the memory of the model taken apart
        self._arrays = to_arrays(self._layout.restore(self._origin))
        result = Result(arrays=self._arrays)
        if evaluate_fn and (metrics := evaluate_fn(0, result.arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = metrics
        started = time.monotonic()
        for number in range(1, num_rounds + 1):
            record = RoundRecord(number)
            messages = self.configure_train(number, result.arrays, train_config or ConfigRecord(), grid)
            asked = self._asked.push(grid, messages)
            del messages
            enough = self.patience.enough(len(asked)) if self.patience and asked else None
            replies = self._timed(arrivals(grid, asked, timeout, enough))
            result.arrays = self._aggregate(record, replies) or result.arrays
            if self.patience:
                record.rule |= {"waited-for": float(enough or 0)}
                self.patience.after(self._arrived, record.train.get("loss"))
            if record.train:
                result.train_metrics_clientapp[number] = MetricRecord(dict(record.train))

            messages = self.configure_evaluate(number, result.arrays, evaluate_config or ConfigRecord(), grid)
            record.evaluate = self._hear(arrivals(grid, self._asked.push(grid, messages), timeout))
            if record.evaluate:
                result.evaluate_metrics_clientapp[number] = MetricRecord(dict(record.evaluate))

            if evaluate_fn and (metrics := evaluate_fn(number, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = metrics
                record.server = {
                    name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))
                }
            ended = time.monotonic()  # what is written down of a round is part of the next one's time
            record.seconds, started = ended - started, ended
            self._finish(record, num_rounds)
        return result

    def _take(self, arrays: ArrayRecord) -> None:
        """Make `arrays` the round's model, unless it is what the last round ended with."""
        if arrays is self._arrays:
            return
        state = to_state(arrays)
        self._layout = Layout.of(state, self.buffers)
        self._door = Door(self._layout, self.weighted_by_key, self.rule.wants_steps)
        self._largest = min((torch.finfo(entry.dtype).max for entry in self._layout.parameters), default=1.0)
        if self.proxy is not None:
            ours, theirs = (
                [(e.name, list(e.shape), e.dtype) for e in layout.parameters]
                for layout in (self._layout, self.proxy.layout)
            )
            if ours != theirs:
                name, shape, dtype = next((e for e in [*theirs, *ours] if e not in ours or e not in theirs), ours[0])
                raise ValueError(f"The proxy's module is not the model: {name!r}, {dtype} {shape}, is in one only.")
        self._origin = self._layout.flatten(state)
        self._arrays = arrays

    def _messages(self, kind: str, server_round: int, config: ConfigRecord, nodes: Mapping[str, int]) -> list[Message]:
        config = config.copy()
        config[ROUND] = server_round
        self._config = config
        models: dict[int, tuple[Model, dict[str, int]]] = {}  # one for all sites, or several that the rule keeps
        for name, node_id in nodes.items():
            model = self.rule.model_for(name, self._origin, self.memory)
            models.setdefault(model.parameters.data_ptr(), (model, {}))[1][name] = node_id
        asked: dict[str, Message] = {}
        for model, theirs in models.values():
            asked |= Asked.of(self._content(model), theirs, kind, str(server_round)).messages
        self._asked = Asked({name: asked[name] for name in nodes})
        return list(self._asked.messages.values())

    def _content(self, model: Model) -> RecordDict:
        arrays = self._arrays if model is self._origin else to_arrays(self._layout.restore(model))
        return RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: self._config})

    def _aggregate(self, record: RoundRecord, replies: Named) -> ArrayRecord | None:
        """Door and rule: the next model, or None when it is still the same. Fills in `record`."""
        heard: dict[str, Report | Rejection] = {}
        admitted = self._admitted(replies, heard)
        if self.patience:
            admitted = self.patience.watch(self._origin, admitted)
        if self.guard and self.guard.rules:  # every rule reads them
            admitted = iter(kept := list(admitted))
        outcome = self.rule.aggregate(self._origin, admitted, self.memory, frozenset(self.known), self.proxy)
        self.memory = outcome.memory
        record.rule = dict(outcome.notes)
        record.verdicts = verdicts(self._asked.messages, heard, outcome.weights)
        record.train = mean_metrics(report for report in heard.values() if isinstance(report, Report))
        for verdict in record.verdicts:
            if verdict.reason and verdict.code != Code.OFFLINE:
                log.info("\t│ %s (%s)", verdict.reason, verdict.code)
        model, moments = outcome.model, self.moments
        if model is self._origin:
            return None
        if self.step is not None and self.moments is not None:
            model, moments = self.step.apply(self._origin, model, self.moments)
        rule_model = model
        if self.guard:
            model = self._elected(self.guard, model, kept if self.guard.rules else [], record)
        if not is_bounded(model.parameters, self._largest):
            log.warning("\t│ The rule's model is not finite; the round keeps the model before it.")
            return None
        if model is rule_model:  # what is not taken leaves no momentum behind
            self.moments = moments
        self._origin = model
        self._arrays = to_arrays(self._layout.restore(model))
        return self._arrays

    def _elected(self, guard: Guard, model: Model, replies: list[Reply], record: RoundRecord) -> Model:
        """The candidate that the sites prefer, by the guard's election; the model itself when nobody says anything."""
        if self._grid is None:
            raise RuntimeError("A guard asks the sites, so it needs their grid: call configure_train before it.")
        others, self.guard_memories = guard.candidates(
            self._origin, replies, self.guard_memories, frozenset(self.known), self.proxy
        )
        candidates = [model, *others, self._origin]
        nodes, heard = self._asked.nodes, []
        for number, candidate in enumerate(candidates):
            group = f"{record.round}-candidate-{number}"
            self._asked = Asked.of(self._content(candidate), nodes, MessageType.EVALUATE, group)
            asked = self._asked.push(self._grid, list(self._asked.messages.values()))
            heard.append([self._door.hear(node, m) for node, m in arrivals(self._grid, asked, self._timeout)])
        choice = guard.choose(heard)
        if choice is None:
            return model
        record.rule |= {"elected": float(choice.candidate), "elected-certificate": float(choice.certificate)}
        if choice.candidate:
            what = guard.rules[choice.candidate - 1] if choice.candidate <= len(others) else "the model before"
            log.info("\t│ The sites elected %s (%d could have lied in vain)", what, choice.certificate)
        return candidates[choice.candidate]

    def _timed(self, replies: Named) -> Iterator[tuple[str, Message | Exception]]:
        """`replies`, with the time at which each came written down."""
        started, self._arrived = time.monotonic(), []
        for node, reply in replies:
            if isinstance(reply, Message) and not reply.has_error():
                self._arrived.append(time.monotonic() - started)
            yield node, reply
            del reply

    def _admitted(self, replies: Named, heard: dict[str, Report | Rejection]) -> Iterator[Reply]:
        for node, message in replies:
            verdict = self._door.admit(node, message)
            del message
            if isinstance(verdict, Rejection):
                heard[node] = verdict
                continue
            heard[node] = verdict.report
            yield verdict
            del verdict  # its memory goes to the next reply

    def _hear(self, replies: Named) -> dict[str, float]:
        heard = [self._door.hear(node, message) for node, message in replies]
        for verdict in heard:
            if isinstance(verdict, Rejection) and verdict.code != Code.OFFLINE:
                log.info("\t│ %s (evaluation: %s)", verdict.reason, verdict.code)
        return mean_metrics(report for report in heard if isinstance(report, Report))

    def _finish(self, record: RoundRecord, num_rounds: int) -> None:
        if self.journal is not None:
            memory = (self.memory, self.moments, self.guard_memories)
            self.journal.write(record, self._layout.restore(self._origin), memory)
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
