"""A rule as a Flower strategy: right under Flower's own `start()`, streaming under its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid

from corymb.protocol.codec import to_arrays
from corymb.protocol.records import ARRAYS, CONFIG, EXAMPLES
from corymb.server.journal import Journal
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.server.rounds.conclude import conclude
from corymb.server.rounds.door import Door
from corymb.server.rounds.record import RoundRecord, as_metrics, mean_metrics
from corymb.server.rounds.rejections import Code, Rejection
from corymb.server.rounds.requests import Keys, Phase
from corymb.server.rounds.roster import Sampling
from corymb.server.rounds.round import Round
from corymb.server.rounds.round_loop import RoundLoop
from corymb.server.rounds.round_size import RoundSize
from corymb.server.rounds.sent_model import SentModel, model_in
from corymb.server.rounds.state import Method, RunState
from corymb.strategies import Model, Proxy, Report, Rule, ServerOptimizer

log = logging.getLogger("flwr.corymb")  # under Flower's logger, so that its handlers show it


class FlowerStrategy(RoundLoop):
    """Aggregates with `rule`; give it wherever Flower takes a strategy.

    `fraction_train` and `fraction_evaluate` of the connected nodes are asked in a round, drawn from `seed` by node
    name, once `min_available_nodes` have connected (`TimeoutError` after `wait_seconds`). Errors, silence and replies
    that the door turns away cost a round nothing but that reply. `server_optimizer` acts after the rule; `proxy` is the
    server's own data, for rules that need them. With a `candidate_election` the sites elect each round's model;
    `round_size` says how many replies a round waits for under this `start()`. `buffers` names the float buffers in the
    state dict (default: BatchNorm's statistics). With a `journal`, each round is committed there under this `start()`.
    `on_round` is called with every finished round's record.

    What changes over rounds is the value `state`: use a new strategy for a new run.
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
        server_optimizer: ServerOptimizer | None = None,
        candidate_election: CandidateElection | None = None,
        round_size: RoundSize[Any] | None = None,
        proxy: Proxy | None = None,
        journal: Journal | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        self.method = Method(rule, server_optimizer, candidate_election, round_size, proxy, weighted_by_key)
        self.sampling = Sampling(fraction_train, fraction_evaluate, min_available_nodes, wait_seconds, seed)
        self.buffers = buffers
        self.journal = journal
        self.on_round = on_round
        self.record = RoundRecord(0)  # of the round that is under way
        self._state: RunState | None = None
        self._sent: SentModel | None = None  # the state's model as a record
        self._phase = Phase(Keys(arrayrecord_key, configrecord_key))
        self._grid: Grid | None = None
        self.timeout = 3600.0

    @property
    def rule(self) -> Rule[Any]:
        """The rule."""
        return self.method.rule

    @property
    def state(self) -> RunState:
        """All that the run has reached. Raises `RuntimeError` before `configure_train` brings the first model."""
        if self._state is None:
            raise RuntimeError("There is no model yet: call configure_train before it.")
        return self._state

    @state.setter
    def state(self, state: RunState) -> None:
        self._state = state

    def summary(self) -> None:
        """Log the rule and how nodes are chosen."""
        log.info("\t├── Rule: %s", self.rule)
        log.info("\t├── Ask: train %g | evaluate %g", self.sampling.train, self.sampling.evaluate)
        log.info("\t└── Wait for: %d nodes | seed %d", self.sampling.available, self.sampling.seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """A training message for each sampled node. Neither `arrays` nor `config` is changed."""
        self.take(arrays)
        self._grid = grid
        connected, chosen = self.sampling.for_training(grid, server_round)
        return self._phase.ask(
            MessageType.TRAIN, server_round, config, connected, chosen, self._model_for, self._arrays
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model and mean metrics after `replies` to `configure_train`; None where nobody counted."""
        before = self.state.model
        asked = Round(server_round, self.method, self._phase.requests)
        self.state, self.record = conclude(self.state, asked, replies, self._evaluated)
        for verdict in self.record.verdicts:
            if verdict.reason and verdict.code != Code.OFFLINE:
                log.info("\t│ %s (%s)", verdict.reason, verdict.code)
        if "not-finite" in self.record.notes:
            log.warning("\t│ The rule's model is not finite; the round keeps the model before it.")
        if self.state.model is not before:
            self._sent = SentModel.of(self.state.model)
        moved = self.state.model is not before or self.record.admitted
        return self._sent.arrays if moved and self._sent else None, as_metrics(self.record.train)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """An evaluation message for each sampled node."""
        self.take(arrays)
        connected, chosen = self.sampling.for_evaluation(grid, server_round)
        return self._phase.ask(
            MessageType.EVALUATE, server_round, config, connected, chosen, self._model_for, self._arrays
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean metrics of `replies`, weighed by examples."""
        door = Door(self.state.model.layers, self.method.examples_key)
        reports = [door.admit_metrics(node, reply) for node, reply in self._phase.requests.named(replies)]
        for verdict in reports:
            if isinstance(verdict, Rejection) and verdict.code != Code.OFFLINE:
                log.info("\t│ %s (evaluation: %s)", verdict.reason, verdict.code)
        return as_metrics(mean_metrics(report for report in reports if isinstance(report, Report)))

    def take(self, arrays: ArrayRecord) -> ArrayRecord:
        """See `RoundLoop.take`.

        Raises `CodecError` for arrays that are no model, `ValueError` if the proxy's differs.
        """
        if self._sent is None or not self._sent.is_still(arrays):
            model = model_in(arrays, self.buffers)
            self.method.check(model)
            self._state = replace(self._state, model=model) if self._state else self.method.initial(model)
            self._sent = SentModel.of(model)
        return self._sent.arrays

    def sent(self, messages: Iterable[Message]) -> None:
        """Take note that the `messages` of a phase have been pushed; replies are told by their ids."""
        self._phase.sent(messages)

    def _model_for(self, name: str) -> Model:
        return self.method.rule.model_for(name, self.state.model, self.state.memory)

    def _arrays(self, model: Model) -> ArrayRecord:
        if self._sent is not None and model is self.state.model:
            return self._sent.arrays
        return to_arrays(model.layers.restore(model))

    def _evaluated(self, model: Model) -> Iterator[tuple[str, Message]]:
        """Have the nodes that were asked to train evaluate `model`: their names and replies."""
        if self._grid is None:
            raise RuntimeError("The sites cannot be asked without their grid: call configure_train before it.")
        return self._phase.evaluations(model, self._arrays, self._grid, self.timeout)
