"""The exchange with nodes in a deployment: what a restart, an election and a repeated request must not do."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from corymb.client.algorithms.memory_files import folder_of
from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import MESSAGE_LOST, empty_run, set_message_id, set_task_identity
from corymb.protocol.records import DEADLINE, MEMORY, NONCE, memory_run
from corymb.server import CandidateElection, FlowerStrategy, Journal, Policy, Requests
from corymb.server.rounds import asking, patience
from corymb.server.rounds import exchange as exchange_module
from corymb.server.rounds.asking import copy_of
from corymb.server.rounds.conclude import conclude
from corymb.server.rounds.events import EventLog
from corymb.server.rounds.exchange import Exchange
from corymb.server.rounds.late import LateReplies
from corymb.server.rounds.roster import connected
from corymb.server.rounds.round import Asked, Round
from corymb.server.rounds.state import Method
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg, FedNova, Layout, Median
from corymb.tests.server.rounds.wire import FIRST_ID, Wire
from corymb.tests.support import content

STATE = {"counts": torch.zeros(3, 3)}


def ask_train(journal: Journal, wire: Wire, messages: list[Message]) -> Exchange:
    """Begin the training of round 1 over `wire`."""
    exchange = Exchange(wire, 60.0, journal.asks)
    ask(exchange, 1, messages)
    return exchange


def ask(exchange: Exchange, number: int, messages: list[Message]) -> None:
    """Begin the training of round `number`."""
    config = exchange.begin(number, "train", ConfigRecord({"server-round": number}))
    for message in messages:
        message.content["config"] = config
    names = {FIRST_ID + i: f"node-{FIRST_ID + i}" for i in range(3)}
    exchange.push(messages, lambda sent: Requests.of(sent, names))


def answer_all(wire: Wire) -> None:
    for node in wire.nodes:
        if node.queue:
            wire.answer(node)


def messages_to_three() -> list[Message]:
    set_task_identity(run_id=7, node_id=1)
    return [Message(RecordDict({"arrays": to_arrays(STATE)}), FIRST_ID + i, "train") for i in range(3)]


def test_a_training_phase_that_has_ended_stays_ended_after_a_restart(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        wire = Wire(3)
        exchange = ask_train(journal, wire, messages_to_three())
        for node in wire.nodes[:2]:
            wire.answer(node)
        assert len([reply for reply, _ in zip(exchange.replies(2), range(2), strict=False)]) == 2
        assert journal.asks is not None
        journal.asks.note_asked(1, "evaluate", Asked("n", Requests(), time.time(), 7))
        wire.answer(wire.nodes[2])  # its late reply must not count: two replies made the model that is evaluated
        restarted = ask_train(journal, wire, messages_to_three())
        sources = [reply.metadata.src_node_id for reply in restarted.replies()]
        assert sources == [FIRST_ID, FIRST_ID + 1]


def test_a_late_reply_is_noted_with_its_own_phase(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        assert journal.asks is not None
        wire = Wire(1)
        (message,) = messages_to_three()[:1]
        wire.push_messages([message])
        late = LateReplies(wire, EventLog(journal.asks, visible=False))
        late.add(1, "evaluate", {"node-100": [message.metadata.message_id]})
        message.content["config"] = ConfigRecord({"server-round": 1})
        wire.answer(wire.nodes[0])
        assert late.busy(2) == frozenset()
        with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:
            assert database.execute("SELECT round, phase, what FROM events").fetchall() == [(1, "evaluate", "late")]


def test_each_candidate_of_an_election_is_a_new_question() -> None:
    nonces: list[Any] = []

    def client(message: Message, context: Context) -> Message:
        sent: Any = message.content
        if message.metadata.message_type == "evaluate":
            nonces.append(sent["config"].get(NONCE))
            metrics = RecordDict({"metrics": content({}, 5, accuracy=0.5)["metrics"]})
            return Message(metrics, reply_to=message)
        return Message(content({"w": torch.ones(2)}, 5), reply_to=message)

    grid = LocalGrid(client, 3)
    strategy = FlowerStrategy(FedAvg(), candidate_election=CandidateElection((Median(),)), fraction_evaluate=0.0)
    messages = strategy.configure_train(1, to_arrays({"w": torch.zeros(2)}), ConfigRecord({NONCE: "asked"}), grid)
    strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert nonces == [None] * 9  # three candidates at three clients


def test_a_repeated_request_has_what_is_left_of_the_deadline() -> None:
    original = messages_to_three()[0]
    original.content["config"] = ConfigRecord({DEADLINE: 1200.0, NONCE: "n"})
    copy: Any = copy_of(original, 180.0)
    assert dict(copy.content["config"]) == {DEADLINE: 180.0, NONCE: "n"}
    assert original.content["config"][DEADLINE] == 1200.0
    assert copy.metadata.dst_node_id == original.metadata.dst_node_id


def test_growth_is_measured_from_what_a_site_has_and_not_from_its_share() -> None:
    policy = Policy(max_share=0.5, max_growth=1.5)
    method = Method(FedAvg(), policy=policy)
    state = method.initial(Layout.of(STATE).flatten(STATE))
    nodes = {FIRST_ID + i: f"node-{FIRST_ID + i}" for i in range(3)}
    wire = Wire(3)
    sent = messages_to_three()
    wire.push_messages(sent)
    replies = [Message(content(STATE, examples), reply_to=m) for m, examples in zip(sent, (1000, 10, 10), strict=True)]
    after, record = conclude(state, Round(1, method, Requests.of(sent, nodes)), replies)
    assert record.verdicts[0].weight == 0.5
    assert list(after.guard.examples.values()) == [1000, 10, 10]


def test_a_round_whose_replies_are_all_lost_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the disk of the SuperLink is full; how long a reply takes is then known from the round before."""
    monkeypatch.setattr(asking, "SLACK_SECONDS", 0.0)

    def answer_late(wire: Wire) -> None:
        for node in wire.nodes:
            if wire.pushed[f"node-{FIRST_ID + node.number}"] == 3 and node.queue:
                wire.answer(node)

    wire = Wire(3, answer_late)
    with closing(Journal(tmp_path)) as journal:
        exchange = ask_train(journal, wire, messages_to_three())
        for node in wire.nodes:
            wire.answer(node)
        assert len(list(exchange.replies())) == 3
        ask(exchange, 2, messages_to_three())
        for node in wire.nodes:
            wire.answer(node, is_lost=True)
        assert len(list(exchange.replies())) == 3
    assert [node.trained for node in wire.nodes] == [{1: 1, 2: 1}] * 3


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_node_that_is_offline_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """As nodes are, for the SuperLink, when it comes back and their last heartbeat is a minute old."""
    monkeypatch.setattr(asking, "BACK_SECONDS", 2.0)
    monkeypatch.setattr(exchange_module, "PAUSE_SECONDS", 0.1)
    pulls = 0

    def let_nodes_return(wire: Wire) -> None:
        nonlocal pulls
        pulls += 1
        wire.offline = {0, 1} if pulls < 3 else set() if comes_back else {0}
        for node in wire.nodes:
            if node.number not in wire.offline and node.queue:
                wire.answer(node)

    wire = Wire(3)
    with closing(Journal(tmp_path)) as journal:
        exchange = ask_train(journal, wire, messages_to_three())
        for node in wire.nodes:
            wire.answer(node)
        assert len(list(exchange.replies())) == 3
        wire.before_pull = let_nodes_return
        ask(exchange, 2, messages_to_three())
        replies = list(exchange.replies())
    assert sorted(reply.has_error() for reply in replies) == ([False] * 3 if comes_back else [False, False, True])
    assert [node.trained[2] for node in wire.nodes] == [int(comes_back), 1, 1]


class FailingWire(Wire):
    """A SuperLink that answers 500 in all calls but the first `good` ones, until it has done so `failures` times."""

    def __init__(self, good: int, failures: int) -> None:
        super().__init__(3, answer_all)
        self.good, self.failures = good, failures

    def _fail(self) -> None:
        self.good -= 1
        if self.good < 0 < self.failures:
            self.failures -= 1
            raise httpx.HTTPStatusError("", request=httpx.Request("POST", "http://link"), response=httpx.Response(500))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._fail()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._fail()
        return super().pull_messages(message_ids)

    def get_nodes(self) -> list[Any]:
        self._fail()
        return super().get_nodes()


@pytest.mark.parametrize("good", range(5))
@pytest.mark.parametrize("failures", [1, 7])
def test_while_the_superlink_fails_the_server_goes_on_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, failures: int
) -> None:
    """As while its disk is full; in the first round, too, when nobody knows which clients answer from memory."""
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    wire = FailingWire(good, failures)
    with closing(Journal(tmp_path)) as journal:
        for number in (1, 2):
            assert len(connected(wire)) == 3
            exchange = Exchange(wire, 60.0, journal.asks)
            ask(exchange, number, messages_to_three())
            assert not any(reply.has_error() for reply in exchange.replies())
    assert [node.trained for node in wire.nodes] == [{1: 1, 2: 1}] * 3
    assert not wire.failures


def test_an_error_that_is_not_temporary_is_raised_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        patience.patiently(lambda: 1 // 0)


def test_a_restarted_server_knows_which_clients_answer_from_memory(tmp_path: Path) -> None:
    """Here it died after it had noted what it asks, and before it asked."""
    wire = Wire(3, answer_all)
    with closing(Journal(tmp_path)) as journal:
        exchange = ask_train(journal, wire, messages_to_three())
        assert len(list(exchange.replies())) == 3
        ask(exchange, 2, messages_to_three())
        for node in wire.nodes:
            lost = node.queue.popleft()
            error = Message(Error(min(MESSAGE_LOST), "unknown message"), reply_to=lost)
            wire.ready[lost.metadata.message_id] = error
        restarted = Exchange(wire, 60.0, journal.asks)
        ask(restarted, 2, messages_to_three())
        assert not any(reply.has_error() for reply in restarted.replies())
    assert [node.trained for node in wire.nodes] == [{1: 1, 2: 1}] * 3


@pytest.mark.parametrize("remembers", [True, False])
def test_in_the_first_round_a_lost_reply_waits_until_the_others_show_what_clients_can(
    tmp_path: Path, remembers: bool
) -> None:
    wire = Wire(3, remembers=remembers)
    with closing(Journal(tmp_path)) as journal:
        exchange = ask_train(journal, wire, messages_to_three())
        lost = wire.nodes[0].queue[0]
        wire.answer(wire.nodes[0], is_lost=True)
        wire.ready[lost.metadata.message_id] = Message(Error(min(MESSAGE_LOST), "unknown"), reply_to=lost)
        pulls = 0

        def answer_later(wire: Wire) -> None:
            nonlocal pulls
            pulls += 1
            if pulls > 3:
                answer_all(wire)

        wire.before_pull = answer_later
        replies = list(exchange.replies())
    assert sum(reply.has_error() for reply in replies) == (0 if remembers else 1)
    assert [node.trained for node in wire.nodes] == [{1: 1}] * 3


def test_a_run_that_goes_on_under_another_id_names_the_first_one(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        exchange = ask_train(journal, Wire(3), messages_to_three())
        assert exchange.begin(1, "evaluate", ConfigRecord())[MEMORY] == "7"
    with closing(Journal(tmp_path)) as journal:
        later = Wire(3)
        later._run = empty_run(8)
        config = Exchange(later, 60.0, journal.asks).begin(2, "train", ConfigRecord())
        assert config[MEMORY] == "7"
        context = Context(8, 1, {}, RecordDict(), {})
        run_id = memory_run(RecordDict({"config": config}), context.run_id)
        assert folder_of(context, "north", run_id).parent.name == "7"
        assert folder_of(context, "north").parent.name == "8"


def test_the_door_asks_for_what_the_rules_of_an_election_need() -> None:
    method = Method(FedAvg(), candidate_election=CandidateElection((FedNova(),)))
    model = Layout.of({"w": torch.zeros(2)}).flatten({"w": torch.zeros(2)})
    state = method.initial(model)
    requests = Requests({f"m-{i}": f"site-{i}" for i in range(3)}, tuple(f"site-{i}" for i in range(3)))
    replies = []
    for number, weight in enumerate((2.0, -1.0, 5e-324)):
        set_task_identity(run_id=7, node_id=1)
        request = Message(RecordDict(), 100 + number, "train")
        set_message_id(request, f"m-{number}")
        replies.append(Message(content({"w": torch.ones(2)}, 5, **{"step-weight": weight}), reply_to=request))
    _, record = conclude(state, Round(1, method, requests), replies, lambda model: iter(()))
    assert [verdict.code for verdict in record.verdicts] == ["admitted", "metrics", "metrics"]
