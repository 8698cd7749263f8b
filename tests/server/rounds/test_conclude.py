"""`conclude` alone, Corymb's round loop and Flower's own `start()` give the same results for every rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.flower import set_message_id, set_task_identity
from corymb.protocol.sizes import bytes_of
from corymb.server import (
    CandidateElection,
    FlowerStrategy,
    Method,
    NoReplyAdmitted,
    QuorumMissed,
    Requests,
    Round,
    RoundRecord,
    RunState,
    conclude,
)
from corymb.server.rounds.codes import KEPT_MODEL
from corymb.simulations.grid.contexts import FIRST_NODE_ID
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.simulations.scaffold.fixtures import make_module, make_proxy
from corymb.strategies import RULES, FedAvg, Layout, Median, Rule, ServerOptimizer, make_rule
from corymb.strategies.core.serialization import pack_memory
from corymb.tests.support import NEEDED, REQUIRED_PARAMETERS

NAMES = [f"site-{i:02d}" for i in range(5)]  # the target of FedDA and FedGP is one of them
LAYOUT = Layout.of_module(make_module())
STATE = make_module().state_dict()
QUICK: dict[str, dict[str, Any]] = {"fedlaw": {"epochs": 2}, "run_off_distillation": {"epochs": 1}}
CLASSIFIER = {"weight_matching"}  # this rule cannot match models with a norm layer


def rule_of(name: str) -> Rule[Any]:
    return make_rule(name, **{**REQUIRED_PARAMETERS.get(name, {}), **QUICK.get(name, {})})


# A client's reply: the seed of its update, its number of examples, and the fault of the reply ("" for none).
PlannedReply = tuple[int, int, str]
replies = st.tuples(st.integers(0, 99), st.integers(1, 50), st.sampled_from(["", "", "", "", "nan", "shape", "error"]))
rounds = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, replies)), min_size=1, max_size=3)


def reply_to(message: Message, planned_reply: PlannedReply) -> Message:
    """Return the reply of a client to `message`."""
    seed, examples, wrong = planned_reply
    if wrong == "error":
        return Message(Error(99, "out of memory"), reply_to=message)
    generator = torch.Generator().manual_seed(seed)
    received = to_state(next(r for r in message.content.values() if isinstance(r, ArrayRecord)))
    sent = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in received.items()
    }
    sent["1.running_var"] = sent["1.running_var"].abs()
    if wrong == "nan":
        sent["0.bias"] = torch.full_like(sent["0.bias"], torch.nan)
    if wrong == "shape":
        sent["0.bias"] = torch.zeros(99)
    metrics: dict[str, Any] = {"num-examples": examples, "loss": 1.0 + seed, "accuracy": 0.5, "steps": 3, **NEEDED}
    return Message(RecordDict({"arrays": to_arrays(sent), "metrics": MetricRecord(metrics)}), reply_to=message)


def federation(plan: list[dict[str, PlannedReply]]) -> LocalGrid:
    """Make a grid of clients that reply as planned, round by round."""

    def site(message: Message, context: Context) -> Message:
        config = next(r for r in message.content.values() if isinstance(r, ConfigRecord))
        number = int(config["server-round"])  # type: ignore[arg-type]
        return reply_to(message, plan[number - 1][NAMES[int(context.node_config["partition-id"])]])

    return LocalGrid(site, NAMES)


def alone(method: Method, plan: list[dict[str, PlannedReply]]) -> tuple[RunState, list[RoundRecord]]:
    """Run the rounds by `conclude` alone, without a grid or a loop. Replies arrive in reverse order."""
    set_task_identity(1, 1)
    state, records = method.initial(LAYOUT.flatten(STATE)), []
    for number, planned in enumerate(plan, 1):
        sent: dict[str, Message] = {}
        for row, name in enumerate(NAMES):
            model = method.rule.model_for(name, state.model, state.memory)
            arrays, config = to_arrays(LAYOUT.restore(model)), ConfigRecord({"server-round": number})
            content = RecordDict({"arrays": arrays, "config": config})
            second = method.rule.second_vector(state.model.parameters, state.memory)
            if second is not None:
                content["extra"] = to_arrays(LAYOUT.split(second))
            message = Message(content, FIRST_NODE_ID + row, "train")
            set_message_id(message, f"{number}-{name}")
            sent[name] = message
        down = {name: bytes_of(message) for name, message in sent.items()}
        requests = Requests({m.metadata.message_id: name for name, m in sent.items()}, tuple(NAMES), bytes_down=down)
        replies = [reply_to(sent[name], planned[name]) for name in reversed(NAMES)]
        state, record = conclude(state, Round(number, method, requests), iter(replies))
        records.append(record)
    return state, records


def looped(method: Method, plan: list[dict[str, PlannedReply]], start: Any) -> tuple[RunState, list[RoundRecord]]:
    """Run the rounds through a Flower strategy, with Corymb's `start()` or Flower's."""
    records: list[RoundRecord] = []

    class Recorded(FlowerStrategy):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            result = super().aggregate_train(server_round, replies)
            records.append(self.record)
            return result

    strategy = Recorded(
        method.rule,
        server_optimizer=method.server_optimizer,
        proxy=method.proxy,
        fraction_evaluate=0,
        buffers=[entry.name for entry in LAYOUT.buffers],
    )
    try:
        start(strategy, federation(plan), to_arrays(STATE), num_rounds=len(plan))
    except NoReplyAdmitted:
        assert not any(record.admitted and not KEPT_MODEL.keys() & record.notes.keys() for record in records)
    return strategy.state, records


def contents(state: RunState) -> tuple[Any, Mapping[str, Tensor]]:
    plain, tensors = pack_memory(replace(state, model=None))  # type: ignore[arg-type]
    return plain, tensors | {"model": state.model.parameters, "buffers": state.model.buffers}


def same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one, two) or bool(((one == two) | (one.isnan() & two.isnan())).all())


@pytest.mark.parametrize("name", [name for name in RULES if name not in CLASSIFIER])
@given(plan=rounds)
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
def test_conclude_alone_the_loop_and_flowers_start_agree(name: str, plan: list[dict[str, PlannedReply]]) -> None:
    rule = rule_of(name)
    method = Method(rule, ServerOptimizer("SGD", 0.5, {"momentum": 0.9}), proxy=make_proxy())
    results = [alone(method, plan), looped(method, plan, FlowerStrategy.start), looped(method, plan, Strategy.start)]
    (state, records), others = results[0], results[1:]
    plain, tensors = contents(state)
    for other_state, other_records in others:
        assert [replace(r, seconds=0.0) for r in other_records] == records
        other_plain, other_tensors = contents(other_state)
        assert other_plain == plain
        assert tensors.keys() == other_tensors.keys()
        assert all(same(tensors[key], other_tensors[key]) for key in tensors)
    for number, (record, planned) in enumerate(zip(records, plan, strict=True), 1):
        assert record.round == number
        assert [verdict.node for verdict in record.verdicts] == NAMES
        assert {v.node for v in record.admitted} == {name for name, (_, _, wrong) in planned.items() if not wrong}
    assert state.round == len(plan)
    assert state.known_nodes == frozenset(NAMES)
    assert state.cost.messages == len(plan) * len(NAMES)
    used = [record for record in records if not KEPT_MODEL.keys() & record.notes.keys()]
    assert state.cost.admitted == sum(len(record.admitted) for record in used)
    assert state.model.parameters.isfinite().all()


@given(plan=rounds)
@settings(max_examples=10)
def test_conclude_does_not_change_its_arguments(plan: list[dict[str, PlannedReply]]) -> None:
    method = Method(make_rule("fedvarp"), ServerOptimizer("Adam", 0.1))
    state, _ = alone(method, plan)
    plain, tensors = contents(state)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    requests = Requests({}, tuple(NAMES))
    for _ in range(2):
        conclude(state, Round(state.round + 1, method, requests), iter(()))
    assert contents(state)[0] == plain
    assert all(same(tensors[key], copies[key]) for key in copies)


def message_to(name: str, number: int = 1) -> Message:
    set_task_identity(1, 1)
    arrays = to_arrays(STATE)
    message = Message(RecordDict({"arrays": arrays, "c": ConfigRecord()}), FIRST_NODE_ID + NAMES.index(name), "train")
    set_message_id(message, f"{number}-{name}")
    return message


def test_replies_are_matched_by_the_message_that_they_refer_to() -> None:
    """Even error replies that the SuperLink made under its own node id. A node's second reply is not read."""
    method = Method(FedAvg())
    sent = [message_to(name) for name in NAMES[:3]]
    requests = Requests({m.metadata.message_id: n for m, n in zip(sent, NAMES, strict=False)}, tuple(NAMES[:3]))
    failed = Message(Error(5, "offline"), reply_to=sent[2])
    failed.metadata.__dict__["_src_node_id"] = 1
    replies = [reply_to(sent[0], (1, 1, "")), reply_to(sent[0], (2, 9, "")), failed]
    state, record = conclude(method.initial(LAYOUT.flatten(STATE)), Round(1, method, requests), iter(replies))
    assert [(v.node, v.code) for v in record.verdicts] == [
        ("site-00", "admitted"),
        ("site-01", "silent"),
        ("site-02", "offline"),
    ]
    assert record.notes["second-replies"] == 1
    expected = LAYOUT.flatten(to_state(replies[0].content["arrays"]))  # type: ignore[arg-type]
    torch.testing.assert_close(state.model.parameters, expected.parameters)


def test_conclude_holds_the_candidate_election() -> None:
    """Clients elect the model before the round, and the round's momentum is discarded."""
    method = Method(FedAvg(), ServerOptimizer("SGD", 1.0, {"momentum": 0.9}), CandidateElection((Median(),)))
    state = method.initial(LAYOUT.flatten(STATE))
    sent = {name: message_to(name) for name in NAMES}
    requests = Requests({m.metadata.message_id: n for n, m in sent.items()}, tuple(NAMES))
    replies = [reply_to(m, (seed, 1, "")) for seed, m in enumerate(sent.values())]

    def evaluate(model: Any) -> Any:
        loss = float((model.parameters - state.model.parameters).norm())
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        for name, message in sent.items():
            yield name, Message(RecordDict({"m": metrics}), reply_to=message)

    after, record = conclude(state, Round(1, method, requests), iter(replies), evaluate)
    assert record.notes["elected"] == 2
    assert after.model is state.model
    assert after.moments == state.moments
    with pytest.raises(ValueError, match="pass `evaluate` to `conclude`"):
        conclude(state, Round(1, method, requests), iter(replies))


def test_a_round_below_quorum_leaves_all_but_the_count_of_messages() -> None:
    """The model, the rule's memory and the optimiser; with enough replies, the same round changes them."""
    for quorum, is_abandoned in ((4, True), (3, False)):
        method = Method(make_rule("fedau"), ServerOptimizer("Adam", 0.1), quorum=quorum)
        state, _ = alone(method, [dict.fromkeys(NAMES, (1, 5, ""))])
        sent = {name: message_to(name) for name in NAMES}
        requests = Requests({m.metadata.message_id: n for n, m in sent.items()}, tuple(NAMES))
        wrong = ["", "", "", "nan", "error"]
        replies = [reply_to(m, (2, 5, fault)) for m, fault in zip(sent.values(), wrong, strict=True)]
        after, record = conclude(state, Round(2, method, requests), iter(replies))
        assert [v.code for v in record.verdicts].count("admitted") == 3
        assert (record.notes.get("below-quorum") == quorum) == is_abandoned
        assert (after.model is state.model) == is_abandoned
        assert (after.memory is state.memory) == is_abandoned
        assert (after.moments is state.moments) == is_abandoned
        assert (after.round, after.cost.admitted) == (2, state.cost.admitted + (0 if is_abandoned else 3))
        assert all((v.weight is None) == is_abandoned for v in record.admitted)


def test_rounds_below_quorum_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corymb.server.rounds.round_loop.FIRST_PAUSE", 0.0)
    few = dict.fromkeys(NAMES[:2], (1, 5, "")) | dict.fromkeys(NAMES[2:], (1, 5, "error"))
    enough = dict.fromkeys(NAMES, (1, 5, ""))
    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0, quorum=3, max_abandoned=2)
    plan = [few, enough, few, few, enough]
    with pytest.raises(QuorumMissed, match=r"2 rounds in a row .* quorum of 3, so the run ends after round 4"):
        strategy.start(federation(plan), to_arrays(STATE), num_rounds=5)
    assert (strategy.state.round, strategy.state.cost.admitted) == (4, 5)
