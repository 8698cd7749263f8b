"""The Flower strategy that aggregates with one of Corymb's rules.

It works with Flower's `Strategy.start()`. Its own `start()` also processes each reply as soon as it arrives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.codec import to_arrays
from corymb.protocol.records import ARRAYS, CONFIG, EXAMPLES, METRICS
from corymb.server.journal import Journal
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.server.rounds.codes import ADMITTED, KEPT_MODEL
from corymb.server.rounds.conclude import conclude, conclude_evaluation
from corymb.server.rounds.policy import Policy
from corymb.server.rounds.record import RoundRecord, Verdict, as_metrics, log_reasons
from corymb.server.rounds.requests import Keys, Phase
from corymb.server.rounds.roster import Sampling
from corymb.server.rounds.round import Requests, Round
from corymb.server.rounds.round_loop import RoundLoop
from corymb.server.rounds.round_size import RoundSize
from corymb.server.rounds.sent_model import SentModel, model_in
from corymb.server.rounds.staleness import Asynchrony
from corymb.server.rounds.state import Method, RunState
from corymb.strategies import Model, Proxy, Rule, ServerOptimizer

AggregateMetrics = Callable[[list[RecordDict], str], MetricRecord]
SPILL_BYTES = 4e9
log = logging.getLogger("flwr.corymb")  # a child of Flower's logger, so that Flower's handlers show its lines


class FlowerStrategy(RoundLoop):
    """A Flower strategy that aggregates replies with `rule`.

    The first round waits until `min_available_nodes` are connected, and raises `TimeoutError` after `wait_seconds`. It
    samples the fraction `fraction_train` of the connected nodes for training, and later `fraction_evaluate` for
    evaluation; at least `min_train_nodes` and `min_evaluate_nodes`. The samples depend on `seed`, the round and the
    names of the nodes. If a reply is an error, is missing or is rejected by the door, the round continues without it.

    `server_optimizer` is applied to the rule's model. `proxy` is the server's proxy data, for rules that need it.
    With a `candidate_election`, the clients elect each round's model. `buffers` names the float buffers in the state
    dict (default: BatchNorm's statistics).

    With `sites_to_start`, so many nodes are sampled for training, whatever the fraction. `policy` limits what a single
    reply may do. Of the models that a rule sees together, at most `spill_bytes` are in memory, the rest in files. A
    round with fewer than `quorum` admitted replies is abandoned: model, memory and optimiser stay as they were.

    With `shares_nothing`, the model may be empty, as each client trains a model of its own. With `drift`, the records
    have the length of each update, and its cosine with the rule's step. With `asynchrony`, there are no rounds: the
    model changes after a number of replies. That and five more arguments need this class's own `start()`:
    `max_abandoned` such rounds in a row end the run with `QuorumMissed`, with growing pauses between them. `round_size`
    decides how many replies a round waits for, `journal` stores each finished round, `resume` goes on after the last
    one in it, and `on_round` is called with the record of each.

    `train_metrics_aggr_fn` and `evaluate_metrics_aggr_fn` replace the mean of the metrics. They are called as in
    Flower, with the content of each admitted reply and `weighted_by_key`; the content has the metrics only.

    The attribute `state` holds everything that changes from round to round. Use a new strategy for each run.
    """

    def __init__(
        self,
        rule: Rule[Any],
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        wait_seconds: float = 3600.0,
        seed: int = 0,
        buffers: Collection[str] | None = None,
        weighted_by_key: str = EXAMPLES,
        arrayrecord_key: str = ARRAYS,
        configrecord_key: str = CONFIG,
        train_metrics_aggr_fn: AggregateMetrics | None = None,
        evaluate_metrics_aggr_fn: AggregateMetrics | None = None,
        server_optimizer: ServerOptimizer | None = None,
        candidate_election: CandidateElection | None = None,
        round_size: RoundSize[Any] | None = None,
        proxy: Proxy | None = None,
        sites_to_start: int = 0,
        quorum: int = 0,
        policy: Policy | None = None,
        spill_bytes: float = SPILL_BYTES,
        shares_nothing: bool = False,
        drift: bool = False,
        asynchrony: Asynchrony | None = None,
        max_abandoned: int = 5,
        journal: Journal | None = None,
        resume: bool = False,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule is {rule!r}; pass an instance of a rule, such as FedAU().")
        self.method = Method(
            rule, server_optimizer, candidate_election, round_size, proxy, weighted_by_key, seed, quorum, policy,
            spill_bytes, shares_nothing, drift,
        )  # fmt: skip
        self.sampling = Sampling(
            fraction_train, fraction_evaluate, min_available_nodes, wait_seconds, seed, min_train_nodes,
            min_evaluate_nodes, max(quorum, 1), sites_to_start,
        )  # fmt: skip
        self._aggregate_metrics = {"train": train_metrics_aggr_fn, "evaluate": evaluate_metrics_aggr_fn}
        self.buffers, self.asynchrony = buffers, asynchrony
        self.journal, self.resume, self.on_round = journal, resume, on_round
        self.max_abandoned = max_abandoned
        self.record = RoundRecord(0)  # of the current round
        self._state: RunState | None = None
        self._sent: SentModel | None = None  # the state's model as a record
        self._phase = Phase(Keys(arrayrecord_key, configrecord_key))
        self._grid: Grid | None = None
        self.timeout, self.busy = 3600.0, frozenset()
        self.connected_before: int | None = None

    @property
    def rule(self) -> Rule[Any]:
        """The aggregation rule."""
        return self.method.rule

    @property
    def state(self) -> RunState:
        """The current state of the run. Raises `RuntimeError` if `configure_train` has not yet received a model."""
        if self._state is None:
            raise RuntimeError("The strategy has no model yet; call configure_train first.")
        return self._state

    @state.setter
    def state(self, state: RunState) -> None:
        self._state = state

    def summary(self) -> None:
        """Log the rule and the sampling of nodes."""
        log.info("\t├── Rule: %s", self.rule)
        log.info("\t├── Sampled fractions: train %g | evaluate %g", self.sampling.train, self.sampling.evaluate)
        log.info("\t└── Required nodes: %d | seed %d", self.sampling.min_nodes, self.sampling.seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return a training message for each sampled node. Neither `arrays` nor `config` is changed."""
        self.set_model(arrays)
        self._grid = grid
        out = {*self.state.guard.quarantined(server_round), *self.orders.excluded}
        connected, chosen = self.sampling.for_training(grid, server_round, out, self.busy, self.connected_before)
        self.connected_before = len(connected)
        second = self.rule.second_vector(self.state.model.parameters, self.state.memory)
        extra = None if second is None else to_arrays(self.state.model.layers.split(second))
        return self._phase.begin(
            MessageType.TRAIN, server_round, config, connected, chosen, self._model_for, self.record_of, extra
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the `replies` to the messages of `configure_train`.

        Returns the next model and the mean training metrics. The model is None if it has not changed and no reply was
        admitted; the metrics are None if there are none.
        """
        before = self.state.model
        current = Round(server_round, self.method, self._phase.requests)
        self.state, self.record = conclude(self.state, current, replies, self._evaluations)
        log_reasons(self.record.verdicts, "")
        for why in (why for note, why in KEPT_MODEL.items() if note in self.record.notes):
            log.warning("\t│ The round keeps the previous model, because %s.", why)
        if self.state.model is not before:
            self._sent = SentModel.of(self.state.model)
        has_result = self.state.model is not before or self.record.admitted
        metrics = self._metrics("train", self.record.admitted, self.record.train)
        return self._sent.arrays if has_result and self._sent else None, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return an evaluation message for each sampled node."""
        self.set_model(arrays)
        out = {*self.state.guard.quarantined(server_round), *self.orders.excluded}
        connected, chosen = self.sampling.for_evaluation(grid, server_round, out, self.busy)
        return self._phase.begin(
            MessageType.EVALUATE, server_round, config, connected, chosen, self._model_for, self.record_of
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean metrics of `replies`, weighted by examples; None if there are none."""
        current = Round(server_round, self.method, self._phase.requests)
        self.state, evaluations, means = conclude_evaluation(self.state, current, replies)
        self.record = replace(self.record, evaluations=evaluations)
        log_reasons(evaluations, "evaluation: ")
        return self._metrics("evaluate", [verdict for verdict in evaluations if verdict.code == ADMITTED], means)

    def _metrics(self, phase: str, admitted: list[Verdict], means: Mapping[str, float]) -> MetricRecord | None:
        """Return `means`, or what the user's own function makes of the metrics of the `admitted` replies."""
        aggregate, key = self._aggregate_metrics[phase], self.method.examples_key
        if aggregate is None or not admitted:
            return as_metrics(means)
        contents = [RecordDict({METRICS: MetricRecord({**v.metrics, key: v.examples})}) for v in admitted]
        return aggregate(contents, key)

    def set_model(self, arrays: ArrayRecord) -> ArrayRecord:
        """See `RoundLoop.set_model`.

        Raises `CodecError` if an array is invalid, and `ValueError` if the proxy's module does not match the model.
        """
        if self._sent is None or not self._sent.is_unchanged(arrays):
            model = model_in(arrays, self.buffers)
            self.method.check(model)
            self._state = replace(self._state, model=model) if self._state else self.method.initial(model)
            self._sent = SentModel.of(model)
        return self._sent.arrays

    def sent_model(self) -> ArrayRecord:
        """See `RoundLoop.sent_model`."""
        self._sent = SentModel.of(self.state.model)
        return self._sent.arrays

    def about(self) -> dict[str, str]:
        """See `RoundLoop.about`."""
        return self.method.about()

    def requests_of(self, messages: list[Message]) -> Requests:
        """See `RoundLoop.requests_of`."""
        return Requests.of(messages, self._phase.connected)

    def set_requests(self, requests: Requests) -> None:
        """See `RoundLoop.set_requests`."""
        self._phase.requests = requests

    def _model_for(self, name: str) -> Model:
        return self.method.rule.model_for(name, self.state.model, self.state.memory)

    def record_of(self, model: Model) -> ArrayRecord:
        """See `RoundLoop.record_of`."""
        if self._sent is not None and model is self.state.model and self.asynchrony is None:
            return self._sent.arrays
        return to_arrays(model.layers.restore(model))

    def _evaluations(self, model: Model) -> Iterator[tuple[str, Message]]:
        """Ask the nodes that were sampled for training to evaluate `model`; yield their names and replies."""
        if self._grid is None:
            raise RuntimeError("The strategy has no grid for the candidate election; call configure_train first.")
        return self._phase.evaluations(model, self.record_of, self._grid, self.timeout)
