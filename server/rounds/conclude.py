"""The whole decision of a round: from its replies to the next state and the record. It knows no grid and no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from flwr.app import Message

from corymb.server.rounds.array_checks import is_bounded
from corymb.server.rounds.door import Door
from corymb.server.rounds.record import RoundRecord, mean_metrics, verdicts
from corymb.server.rounds.rejections import Rejection
from corymb.server.rounds.round import Requests, Round
from corymb.server.rounds.state import Method, RunState, Spent
from corymb.strategies import Model, Reply, Report

Named = Iterable[tuple[str, Message]]  # replies with the names of their nodes
Evaluate = Callable[[Model], Named]


@dataclass
class _Checked:
    """The door's result for each node's first reply, and the number of further replies, which are not read."""

    by_node: dict[str, Report | Rejection] = field(default_factory=dict)
    second_replies: int = 0


def conclude(
    state: RunState, round: Round, replies: Iterable[Message], evaluate: Evaluate | None = None
) -> tuple[RunState, RoundRecord]:
    """The state after `round`, and its record.

    Each of `replies` passes the door alone and is read once; then follow the rule, the server optimiser, the
    candidate election and the bounds on what may become the model. Where nothing counts, or the result is not finite,
    the model stays. `evaluate(model)` has the asked nodes evaluate a candidate, and gives their replies; only a
    candidate election calls it, and where there is one it must be given.
    """
    method, requests = round.method, round.requests
    state = state.knowing(requests.nodes).knowing(requests.connected.values())
    door = Door(state.model.layers, method.examples_key, method.rule.wants_steps)
    checked = _Checked()
    admitted = _admitted(door, requests, replies, checked)
    observer = method.round_size.observer(state.round_size, state.model) if method.round_size else None
    if observer is not None:
        admitted = observer.watch(admitted)
    kept: list[Reply] = []
    if method.candidate_election is not None and method.candidate_election.rules:  # every rule reads them
        admitted = iter(kept := list(admitted))
    outcome = method.rule.aggregate(state.model, admitted, state.memory, state.known, method.proxy)
    train = mean_metrics(report for report in checked.by_node.values() if isinstance(report, Report))
    notes = dict(outcome.notes) | ({"second-replies": float(checked.second_replies)} if checked.second_replies else {})
    record = RoundRecord(
        round.number, tuple(verdicts(requests.nodes, checked.by_node, outcome.weights)), train=train, notes=notes
    )
    concluded = replace(
        state,
        round=round.number,
        memory=outcome.memory,
        spent=Spent(state.spent.messages + len(requests.by_message), state.spent.admitted + len(record.admitted)),
        round_size=state.round_size if observer is None else observer.learnt(train.get("loss")),
    )
    if outcome.model is state.model:
        return concluded, record
    return _moved(method, concluded, record, outcome.model, kept, door, evaluate)


def _moved(
    method: Method,
    state: RunState,
    record: RoundRecord,
    model: Model,
    replies: list[Reply],
    door: Door,
    evaluate: Evaluate | None,
) -> tuple[RunState, RoundRecord]:
    """From the rule's `model`, another than the state's, to the one that the next round begins with."""
    moments, memories = state.moments, state.candidate_memories
    if method.server_optimizer is not None and moments is not None:
        model, moments = method.server_optimizer.step(state.model, model, moments)
    chosen = model
    if method.candidate_election is not None:
        if evaluate is None:
            raise ValueError("A candidate election asks the sites; give conclude a function that has them evaluate.")
        others, memories = method.candidate_election.candidates(
            state.model, replies, memories, state.known, method.proxy
        )
        candidates = [model, *others, state.model]
        reports = [[door.admit_metrics(*named) for named in evaluate(candidate)] for candidate in candidates]
        choice = method.candidate_election.choose(reports)
        if choice is not None:
            chosen = candidates[choice.candidate]
            elected = {"elected": float(choice.candidate), "elected-certificate": float(choice.certificate)}
            record = replace(record, notes={**record.notes, **elected})
    state = replace(state, candidate_memories=memories)
    largest = min((torch.finfo(entry.dtype).max for entry in state.model.layers.parameters), default=1.0)
    if not is_bounded(chosen.parameters, largest):
        return state, replace(record, notes={**record.notes, "not-finite": 1.0})
    if chosen is not model:  # what is not taken leaves no momentum behind
        moments = state.moments
    return replace(state, model=chosen, moments=moments), record


def _admitted(door: Door, requests: Requests, replies: Iterable[Message], checked: _Checked) -> Iterator[Reply]:
    """Yield each reply that the door admits, and note its result for every node in `checked`."""
    for node, message in requests.named(replies):
        if node in checked.by_node:
            checked.second_replies += 1
            continue
        verdict = door.admit(node, message)
        del message
        if isinstance(verdict, Rejection):
            checked.by_node[node] = verdict
            continue
        checked.by_node[node] = verdict.report
        yield verdict
        del verdict  # its memory goes to the next reply
