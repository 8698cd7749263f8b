"""The decision of a round: the function that computes the next state and the record from the replies.

It uses neither a grid nor a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import torch
from flwr.app import Message

from corymb.protocol.sizes import bytes_of
from corymb.server.rounds.array_checks import is_bounded
from corymb.server.rounds.codes import BELOW_QUORUM, KEPT_MODEL
from corymb.server.rounds.door import Door
from corymb.server.rounds.drift import with_drift
from corymb.server.rounds.guard_memory import GuardMemory
from corymb.server.rounds.policy import OFFENCES, with_share
from corymb.server.rounds.record import RoundRecord, Verdict, mean_metrics, verdicts
from corymb.server.rounds.rejections import Rejection, not_connected, quarantined
from corymb.server.rounds.round import Round
from corymb.server.rounds.spill import Spill
from corymb.server.rounds.state import Method, RunState
from corymb.strategies import Layout, Model, Outcome, Reply, Report
from corymb.strategies.core.allocation import allocating
from corymb.strategies.core.random_state import seeded_generators
from corymb.strategies.core.rows import SingleRow

NamedReplies = Iterable[tuple[str, Message]]  # replies with the names of their nodes
Evaluate = Callable[[Model], NamedReplies]


@dataclass
class _Checked:
    """The result for each node's first reply; how many replies were not read, because they are second or forged; and
    the norms of updates and numbers of examples that a policy remembers; the bytes of each reply; and the lengths of
    updates of nodes that began from another model than the state's, if drift is recorded.
    """

    by_node: dict[str, Report | Rejection] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    examples: dict[str, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    bytes_up: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)


def conclude(
    state: RunState, round: Round, replies: Iterable[Message], evaluate: Evaluate | None = None
) -> tuple[RunState, RoundRecord]:
    """Return the state after `round`, and the record of the round.

    The door checks each of `replies` separately; `replies` is read once. The rule aggregates the admitted replies.
    The server optimiser, the candidate election and a check for finite numbers then process the rule's model. The
    round keeps the previous model if no reply is admitted or if the new model is not finite, and the previous model,
    memory and optimiser if fewer than the method's quorum are admitted.

    `evaluate(model)` asks the nodes of the round to evaluate a candidate and returns their replies. Only a candidate
    election calls it. Raises `ValueError` if there is an election and `evaluate` is missing.
    """
    method, requests = round.method, round.requests
    state = state.with_known_nodes(requests.nodes).with_known_nodes(requests.connected.values())
    door = _door(method, state.model.layers)
    checked = _Checked()
    admitted = _admitted(door, round, state, replies, checked)
    if method.policy is not None and method.policy.max_share < 1:
        admitted = iter(_shared(list(admitted), method.policy.max_share, checked))
    observer = method.round_size.observer(state.round_size, state.model) if method.round_size else None
    if observer is not None:
        admitted = observer.watch(admitted)
    spill = Spill(method.spill_bytes)
    elects = method.candidate_election is not None and bool(method.candidate_election.rules)
    if method.rule.kind != "blind" or elects or method.drift:
        admitted = spill.watch(admitted)
    stored: list[Reply] = []
    if elects or method.drift:  # they are read again
        admitted = iter(stored := list(admitted))
    with allocating(spill.matrix), seeded_generators(method.seed, round.number):  # a rule's draws can be repeated
        outcome = _outcome(method, state, admitted)
    if method.drift:
        checked.by_node |= with_drift(stored, state.model, outcome.model, checked.lengths)
    train = mean_metrics(report for report in checked.by_node.values() if isinstance(report, Report))
    notes = dict(outcome.notes) | {name: float(count) for name, count in checked.unread.items()}
    absent = state.known_nodes.difference(requests.nodes, requests.connected.values())
    left_out = {node: quarantined(node, state.guard.until[node]) for node in state.guard.quarantined(round.number)}
    results = left_out | checked.by_node | {node: not_connected(node) for node in absent}
    admitted_count = sum(isinstance(report, Report) for report in checked.by_node.values())
    is_abandoned = admitted_count < method.quorum
    weights = {} if is_abandoned else _with_staleness(round, outcome.weights)
    notes |= {BELOW_QUORUM: float(method.quorum)} if is_abandoned else {}
    judged = verdicts(requests.nodes, results, weights, requests.bytes_down, checked.bytes_up)
    record = RoundRecord(round.number, tuple(judged), train=train, notes=notes)
    cost = replace(state.cost, messages=state.cost.messages + len(requests.by_message))
    concluded = replace(state, round=round.number, cost=cost, guard=_guarded(method, state, round.number, checked))
    if is_abandoned:
        return concluded, record
    concluded = replace(
        concluded,
        memory=outcome.memory,
        round_size=state.round_size if observer is None else observer.estimates(train.get("loss")),
    )
    if outcome.model is not state.model:
        concluded, record = _after_rule(method, concluded, record, outcome.model, stored, door, evaluate)
    if KEPT_MODEL.keys() & record.notes.keys():
        return concluded, record
    return replace(concluded, cost=replace(cost, admitted=cost.admitted + admitted_count)), record


def _outcome(method: Method, state: RunState, replies: Iterator[Reply]) -> Outcome[Any]:
    """Return what the rule makes of `replies`; the same model and memory if the clients share nothing."""
    if method.shares_nothing and not state.model.layers.entries:
        for _ in replies:
            pass
        return Outcome(state.model, state.memory)
    return method.rule.aggregate(state.model, replies, state.memory, state.known_nodes, method.proxy)


def _with_staleness(round: Round, weights: Mapping[str, float]) -> Mapping[str, float]:
    """Return the weights of the replies' own updates; a stale one counts less."""
    if round.asynchrony is None:
        return weights
    factor = round.asynchrony.factor
    return {n: w * factor(round.starts[n]) if n in round.starts else w for n, w in weights.items()}


def conclude_evaluation(
    state: RunState, round: Round, replies: Iterable[Message]
) -> tuple[RunState, tuple[Verdict, ...], dict[str, float]]:
    """Return the state after the evaluation of a round's model, the verdicts on the `replies`, and the mean metrics."""
    method, requests = round.method, round.requests
    door = Door(state.model.layers, method.examples_key)
    checked: dict[str, Report | Rejection] = {}
    for node, reply in requests.named(replies):
        if node not in checked and not requests.is_forged(reply):
            checked[node] = door.admit_metrics(node, reply)
    guard = _after_offences(method, state.guard, round.number, checked)
    means = mean_metrics(report for report in checked.values() if isinstance(report, Report))
    return replace(state, guard=guard), tuple(verdicts(requests.nodes, checked, {})), means


def _after_rule(
    method: Method,
    state: RunState,
    record: RoundRecord,
    model: Model,
    replies: list[Reply],
    door: Door,
    evaluate: Evaluate | None,
) -> tuple[RunState, RoundRecord]:
    """Apply the server optimiser, the candidate election and the check that the model is finite.

    `model` is the rule's, which differs from the state's. Returns the state and the record at the end of the round.
    """
    moments, memories = state.moments, state.candidate_memories
    if method.server_optimizer is not None and moments is not None:
        model, moments = method.server_optimizer.step(state.model, model, moments)
    chosen = model
    if method.candidate_election is not None:
        if evaluate is None:
            raise ValueError("A candidate election needs evaluations by the clients; pass `evaluate` to `conclude`.")
        others, memories = method.candidate_election.candidates(
            state.model, replies, memories, state.known_nodes, method.proxy
        )
        candidates = [model, *others, state.model]
        reports = [[door.admit_metrics(*reply) for reply in evaluate(candidate)] for candidate in candidates]
        choice = method.candidate_election.choose(reports)
        if choice is not None:
            chosen = candidates[choice.candidate]
            elected = {"elected": float(choice.candidate), "elected-certificate": float(choice.certificate)}
            record = replace(record, notes={**record.notes, **elected})
    state = replace(state, candidate_memories=memories)
    largest = min((torch.finfo(entry.dtype).max for entry in state.model.layers.parameters), default=1.0)
    if not is_bounded(chosen.parameters, largest):
        return state, replace(record, notes={**record.notes, "not-finite": 1.0})
    if chosen is not model:  # the optimiser's model was not elected, so its new momentum does not count
        moments = state.moments
    return replace(state, model=chosen, moments=moments), record


def _door(method: Method, layout: Layout) -> Door:
    """Return the check of replies for the method's rule and those of its election."""
    rules = [method.rule, *(method.candidate_election.rules if method.candidate_election else ())]
    metrics = dict.fromkeys(name for rule in rules for name in rule.needs_metrics)
    return Door(
        layout, method.examples_key, lambda node: any(rule.wants_batch_updates(node) for rule in rules), tuple(metrics)
    )


def _admitted(
    door: Door, round: Round, state: RunState, replies: Iterable[Message], checked: _Checked
) -> Iterator[Reply]:
    """Yield each reply that the door and the policy admit, and put the result for each node into `checked`."""
    method, policy = round.method, round.method.policy
    for node, message in round.requests.named(replies):
        if round.requests.is_forged(message) or node in checked.by_node:
            checked.unread["forged-replies" if round.requests.is_forged(message) else "second-replies"] += 1
            continue
        start = round.starts.get(node)
        sent = start.model if start is not None else method.rule.model_for(node, state.model, state.memory)
        checked.bytes_up[node] = bytes_of(message)
        verdict = door.admit(node, message, sent)
        del message
        if policy is not None and isinstance(verdict, Reply):
            verdict, norm = policy.check(verdict, sent, state.guard)
            checked.norms += [norm] if norm is not None and isinstance(verdict, Reply) else []
        if isinstance(verdict, Rejection):
            checked.by_node[node] = verdict
            continue
        if method.drift and (start is not None or sent is not state.model):
            squares = SingleRow(verdict.parts).squared_distances(sent.parameters)()
            checked.lengths[node] = sqrt(float(squares[0]))
        if start is not None and round.asynchrony is not None:
            verdict = round.asynchrony.rebased(verdict, start, state.model)
        checked.by_node[node] = verdict.report
        checked.examples[node] = verdict.report.examples
        yield verdict
        del verdict  # frees its memory before the next reply


def _shared(replies: list[Reply], share: float, checked: _Checked) -> list[Reply]:
    """Return `replies` with numbers of examples of which none has more than `share`, and put these into `checked`."""
    replies = with_share(replies, share)
    checked.by_node |= {reply.report.node: reply.report for reply in replies}
    return replies


def _guarded(method: Method, state: RunState, number: int, checked: _Checked) -> GuardMemory:
    """Return what the policy remembers after the training of a round."""
    if method.policy is None:
        return state.guard
    guard = state.guard.after_admitting(checked.norms, checked.examples)
    return _after_offences(method, guard, number, checked.by_node)


def _after_offences(
    method: Method, guard: GuardMemory, number: int, results: Mapping[str, Report | Rejection]
) -> GuardMemory:
    """Return `guard` with a strike for each node whose reply was rejected in round `number`."""
    if method.policy is None or not method.policy.max_strikes:
        return guard
    offenders = [node for node, r in results.items() if isinstance(r, Rejection) and r.code in OFFENCES]
    return guard.after_offences(offenders, number, method.policy.max_strikes, method.policy.quarantine_rounds)
