from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corymb.client.app import round_of
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind, resumable_rounds
from corymb.server import FlowerStrategy, Journal, NoReplyAdmitted, RoundRecord
from corymb.server.journal.files import sha256
from corymb.server.rounds.staleness import Asynchrony
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import IDA, FedAU, FedAvg, Median, Rule, TrimmedMean
from corymb.tests.support import NEEDED, RULES_WITHOUT_PROXY, State, content, reply

numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[tuple[dict[str, Tensor], int]]]:
    """Draw a model and replies to it, with float32, float16 and 0-dim parameters and an int64 buffer."""

    def state() -> dict[str, Tensor]:
        return {
            "weight": torch.tensor(draw(st.lists(numbers, min_size=6, max_size=6))).reshape(2, 3),
            "half": torch.tensor(draw(st.lists(st.floats(-10, 10, width=16), min_size=2, max_size=2))).half(),
            "scale": torch.tensor(draw(numbers)),
            "steps": torch.tensor(7),
        }

    clients = draw(st.integers(1, 7))
    return state(), [(state(), draw(st.integers(1, 10_000))) for _ in range(clients)]


class ListedNodes(LocalGrid):
    """A grid that is only used to list its nodes."""

    def __init__(self, nodes: int) -> None:
        super().__init__(lambda message, context: message, nodes)


def aggregate(strategy: Strategy, origin: State, sent: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """Return the model after one round with the replies `sent`, through Flower's two methods."""
    grid = ListedNodes(len(sent))
    strategy.configure_train(1, to_arrays(origin), ConfigRecord(), grid)
    # Flower's own arrays, because its median removes arrays from replies.
    replies = [
        reply(
            1000 + i,
            RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": size})}),
        )
        for i, (state, size) in enumerate(sent)
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return dict(arrays.to_torch_state_dict())


@pytest.mark.parametrize(
    ("rule", "built_in"),
    [
        (FedAvg(), flower.FedAvg),
        (TrimmedMean(0.2), lambda **options: flower.FedTrimmedAvg(beta=0.2, **options)),
        (Median(), flower.FedMedian),
    ],
    ids=lambda value: type(value).__name__,
)
@given(one=rounds())
def test_rules_equal_flowers_own_except_where_flower_is_wrong(
    rule: Rule[Any], built_in: Callable[..., Strategy], one: tuple[Any, Any]
) -> None:
    """Flower converts the int64 buffer (to 6.999...) and a 0-dim float to float64; Corymb keeps the dtypes.

    The models have no float buffers: Flower aggregates them with the rule, and Corymb does not.
    """
    origin, sent = one
    options = {"min_train_nodes": 1, "min_available_nodes": 1, "min_evaluate_nodes": 1}
    corymb_state = aggregate(FlowerStrategy(rule, min_available_nodes=1), origin, sent)
    flower_state = aggregate(built_in(**options), origin, sent)
    for name in ("weight", "scale"):
        np.testing.assert_allclose(corymb_state[name], flower_state[name], rtol=1e-4, atol=1e-3)
    # Flower sums float16 in float16, with a rounding error in each of up to seven steps.
    np.testing.assert_allclose(corymb_state["half"], flower_state["half"], rtol=2e-2, atol=8e-2)
    assert {name: tensor.dtype for name, tensor in corymb_state.items()} == {
        name: tensor.dtype for name, tensor in origin.items()
    }
    assert corymb_state["steps"].item() == 7


def test_bfloat16_models_work_though_flower_cannot_send_them() -> None:
    origin = {"w": torch.zeros(3).bfloat16()}
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord(origin)
    strategy = FlowerStrategy(FedAvg(), min_available_nodes=1)
    strategy.configure_train(1, to_arrays(origin), ConfigRecord(), ListedNodes(2))
    sent = [reply(1000 + i, content({"w": torch.full((3,), i + 1.0).bfloat16()})) for i in range(2)]
    arrays, _ = strategy.aggregate_train(1, sent)
    assert arrays is not None
    assert torch.equal(to_state(arrays)["w"], torch.full((3,), 1.5).bfloat16())


def learner(message: Message, context: Context) -> Message:
    """A client that moves the model towards its own number and reports the distance as its loss."""
    state = to_state(next(iter(message.content.array_records.values())))
    target = 1 + float(context.node_config["partition-id"])
    distance = float((state["w"] - target).abs().mean())
    if message.metadata.message_type == "evaluate":
        return Message(RecordDict({"m": MetricRecord({"num-examples": 2, "loss": distance})}), reply_to=message)
    moved = {"w": state["w"] + 0.5 * (target - state["w"])}
    return Message(content(moved, int(target), loss=distance, accuracy=0.5), reply_to=message)


def initial() -> ArrayRecord:
    return to_arrays({"w": torch.zeros(5)})


@pytest.mark.parametrize("rule", RULES_WITHOUT_PROXY.values(), ids=RULES_WITHOUT_PROXY.keys())
def test_flowers_start_and_corymbs_give_the_same(rule: Rule[Any]) -> None:
    """Five rounds with eight clients, seven of which are sampled in each."""
    results = []
    for start in (Strategy.start, FlowerStrategy.start):
        strategy = FlowerStrategy(rule, fraction_train=0.9, fraction_evaluate=0.5, seed=3)
        results.append(start(strategy, LocalGrid(learner, 8), initial(), num_rounds=5))
    flower_result, corymb_result = results
    assert torch.equal(to_state(flower_result.arrays)["w"], to_state(corymb_result.arrays)["w"])
    assert flower_result.train_metrics_clientapp == corymb_result.train_metrics_clientapp
    assert flower_result.evaluate_metrics_clientapp == corymb_result.evaluate_metrics_clientapp
    assert float(cast(float, corymb_result.evaluate_metrics_clientapp[5]["loss"])) > 0


class Shuffled(LocalGrid):
    """A grid whose replies arrive in a pseudo-random order."""

    stream = None  # type: ignore[assignment]  # replies are pulled

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        undelivered = [*self._waiting, *self._begun, *self._ready]
        order = sorted(undelivered, key=lambda id_: crc32(id_.encode()))
        return super().pull_messages([id_ for id_ in message_ids if id_ == order[0]])


def test_the_order_of_arrival_does_not_change_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corymb.server.rounds.pulls.POLL_SECONDS", 0)
    for rule in RULES_WITHOUT_PROXY.values():
        models = [
            to_state(FlowerStrategy(rule).start(grid(learner, 9), initial(), num_rounds=4).arrays)["w"]
            for grid in (LocalGrid, Shuffled)
        ]
        assert torch.equal(*models)


def test_rounds_continue_when_clients_fail() -> None:
    def failing(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        if site == 1:
            raise RuntimeError("out of memory")
        if site == 2:
            return Message(Error(99, "disk\nfull"), reply_to=message)
        return learner(message, context)

    records: list[RoundRecord] = []
    strategy = FlowerStrategy(FedAvg(), on_round=records.append)
    result = strategy.start(LocalGrid(failing, 4), initial(), num_rounds=2)
    assert [len(record.admitted) for record in records] == [2, 2]
    reasons = {v.node: (v.code, v.reason) for v in records[0].verdicts if v.reason}
    assert reasons == {
        "client-1": ("error", "client-1: error 2: RuntimeError: out of memory."),
        "client-2": ("error", "client-2: error 99: disk full."),
    }
    assert to_state(result.arrays)["w"][0] > 0


def test_a_round_without_replies_keeps_the_model_and_updates_the_memory() -> None:
    def offline(message: Message, context: Context) -> Message:
        return Message(Error(5, "offline"), reply_to=message)

    strategy = FlowerStrategy(FedAU())
    with pytest.raises(NoReplyAdmitted, match="3 offline"):
        strategy.start(LocalGrid(offline, 3), initial(), num_rounds=2)
    assert torch.equal(strategy.state.model.parameters, torch.zeros(5))
    assert strategy.state.memory.current_interval.tolist() == [2, 2, 2]
    assert strategy.record.train == {}


def test_the_strategy_works_inside_flowers_differential_privacy() -> None:
    inner = FlowerStrategy(FedAvg(), fraction_evaluate=0)
    outer = flower.DifferentialPrivacyServerSideFixedClipping(
        inner, noise_multiplier=0.0, clipping_norm=1e-3, num_sampled_clients=4
    )
    result = outer.start(LocalGrid(learner, 4), ArrayRecord({"w": torch.zeros(5)}), num_rounds=1)
    moved = to_state(result.arrays)["w"].norm()
    assert 0 < moved <= 1.001e-3


def test_the_arguments_are_not_changed() -> None:
    arrays, config = initial(), ConfigRecord({"lr": 0.1})
    FlowerStrategy(IDA()).start(LocalGrid(learner, 3), arrays, 2, train_config=config, evaluate_config=config)
    assert dict(config) == {"lr": 0.1}
    assert list(arrays) == ["w"]
    assert torch.equal(to_state(arrays)["w"], torch.zeros(5))


def test_server_metrics_are_in_the_record_of_their_round() -> None:
    records: list[RoundRecord] = []
    strategy = FlowerStrategy(FedAvg(), on_round=records.append)
    result = strategy.start(
        LocalGrid(learner, 3),
        initial(),
        num_rounds=4,
        evaluate_fn=lambda number, arrays: MetricRecord({"accuracy": number / 10}) if number % 2 == 0 else None,
    )
    assert list(result.evaluate_metrics_serverapp) == [0, 2, 4]
    assert [record.server for record in records] == [{}, {"accuracy": 0.2}, {}, {"accuracy": 0.4}]


def test_only_the_reply_that_the_grid_cannot_receive_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's grid decodes a reply inside the pull, which raises any exception that the bytes cause."""
    monkeypatch.setattr("corymb.server.rounds.pulls.POLL_SECONDS", 0)

    class Breaking(LocalGrid):
        stream = None  # type: ignore[assignment]  # replies are pulled

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            if "message-2" in message_ids:
                raise TypeError("unhashable type: 'list'")
            return super().pull_messages(message_ids)

    records: list[RoundRecord] = []
    FlowerStrategy(FedAvg(), fraction_evaluate=0, on_round=records.append).start(Breaking(learner, 4), initial(), 1)
    assert len(records[0].admitted) == 3
    assert records[0].verdicts[1].reason == (
        "client-1: its reply cannot be received: TypeError: unhashable type: 'list'."
    )


def test_rounds_do_not_wait_for_messages_that_the_grid_refused() -> None:
    class Refusing(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            ids = super().push_messages(messages)
            return ["", *ids[1:]]

    records: list[RoundRecord] = []
    FlowerStrategy(FedAvg(), fraction_evaluate=0, on_round=records.append).start(Refusing(learner, 3), initial(), 1)
    assert [v.code for v in records[0].verdicts] == ["silent", "admitted", "admitted"]


def test_a_model_that_overflows_is_discarded() -> None:
    origin = {"w": torch.full((2,), 1e4).half()}
    strategy = FlowerStrategy(FedAU(server_rate=1e38), min_available_nodes=1)
    strategy.configure_train(1, to_arrays(origin), ConfigRecord(), ListedNodes(1))
    arrays, metrics = strategy.aggregate_train(
        1, [reply(1000, content({"w": torch.full((2,), -6e4).half()}, loss=1.0))]
    )
    assert arrays is not None
    assert torch.equal(to_state(arrays)["w"], origin["w"])
    assert metrics == {"loss": 1.0, **NEEDED}


def test_aggregating_before_configuring_raises_an_error() -> None:
    with pytest.raises(RuntimeError, match="call configure_train first"):
        FlowerStrategy(FedAvg()).aggregate_train(1, [])


def test_a_journal_accepts_one_run_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    FlowerStrategy(FedAvg(), journal=journal).start(LocalGrid(learner, 2), initial(), 2)
    digest = journal.model_sha256()
    with pytest.raises(ValueError, match="already holds 2 rounds"):
        FlowerStrategy(FedAvg(), journal=journal).start(LocalGrid(learner, 2), initial(), 2)
    assert sha256(tmp_path / "model-000002.safetensors") == digest
    journal.close()


@pytest.mark.parametrize("asynchrony", [None, Asynchrony(buffer=2, concurrency=2)])
def test_each_task_names_the_rounds_after_which_the_run_can_be_resumed(
    asynchrony: Asynchrony | None, tmp_path: Path
) -> None:
    named: list[list[tuple[int, ...]]] = [[] for _ in range(6)]

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            configs = of_kind(message.content, ConfigRecord)
            named[round_of(configs)].append(resumable_rounds(configs))
        return learner(message, context)

    for rounds in (3, 5):
        with closing(Journal(tmp_path)) as journal:
            strategy = FlowerStrategy(FedAvg(), journal=journal, resume=rounds > 3, asynchrony=asynchrony)
            strategy.start(LocalGrid(client, 2), initial(), num_rounds=rounds)
    assert [set(each) for each in named[1:]] == [{()}, {(1,)}, {(2, 1)}, {(3, 2)}, {(4, 3)}]


def test_waiting_ends_at_once_if_no_more_nodes_can_join() -> None:
    with pytest.raises(TimeoutError, match="Only 2 of 5 required nodes"):
        FlowerStrategy(FedAvg(), min_available_nodes=5).start(LocalGrid(learner, 2), initial(), 1)


def test_wrong_fractions_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"fraction_train is 1.5; use a value in"):
        FlowerStrategy(FedAvg(), fraction_train=1.5)
