"""The limits on single replies: by hand, as properties, and in whole rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Policy
from corymb.server.rounds.guard_memory import GuardMemory
from corymb.server.rounds.policy import with_share
from corymb.server.rounds.rejections import Rejection
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg, Model, Reply

SENT = Model(torch.tensor([1.0, 1.0]))
NONE = GuardMemory()


def checked(policy: Policy, vector: list[float], examples: float = 10, memory: GuardMemory = NONE) -> Any:
    return policy.check(Reply.of("north", torch.tensor(vector), examples), SENT, memory)


def test_without_limits_a_reply_passes_unchanged() -> None:
    reply, norm = checked(Policy(), [1e6, 1e6], 1e12)
    assert torch.equal(reply.vector(torch.float32), torch.tensor([1e6, 1e6]))
    assert (reply.report.examples, norm) == (1e12, None)


def test_an_update_is_shortened_to_its_limit_or_rejected() -> None:
    reply, norm = checked(Policy(max_norm=2.5), [4.0, 5.0])  # the update is [3, 4], of norm 5
    torch.testing.assert_close(reply.vector(torch.float32), torch.tensor([2.5, 3.0]))
    assert norm == 2.5
    rejected, norm = checked(Policy(max_norm=2.5, excess="reject"), [4.0, 5.0])
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "north: its update has the norm 5, more than the limit of 2.5."
    assert checked(Policy(max_norm=5.0), [4.0, 5.0])[1] == 5


def test_the_norm_limit_follows_the_median_once_there_are_enough_updates() -> None:
    policy = Policy(max_norm_ratio=2.0, excess="reject")
    few, enough = replace(NONE, norms=(1.0,) * 4), replace(NONE, norms=(1.0, 1.0, 2.0, 3.0, 90.0))
    assert isinstance(checked(policy, [4.0, 5.0], memory=few)[0], Reply)
    assert isinstance(checked(policy, [4.0, 5.0], memory=enough)[0], Rejection)  # twice the median is 4
    assert isinstance(checked(policy, [3.4, 4.2], memory=enough)[0], Reply)  # 4.0


@pytest.mark.parametrize(
    ("policy", "limit"),
    [
        (Policy(max_examples=8), 8),
        (Policy(enrolled={"north": 7, "south": 1}), 7),
        (Policy(max_growth=1.5), 9),
        (Policy(max_examples=50, enrolled={"south": 1}), 10),
    ],
)
def test_examples_are_lowered_to_their_limit_or_the_reply_is_rejected(policy: Policy, limit: float) -> None:
    memory = replace(NONE, examples={"north": 6.0})
    assert checked(policy, [1.0, 2.0], 10, memory)[0].report.examples == limit
    outcome, _ = checked(replace(policy, excess="reject"), [1.0, 2.0], 10, memory)
    assert isinstance(outcome, Rejection) == (limit < 10)


sizes = st.lists(st.integers(0, 10**6), min_size=1, max_size=12)


@given(sizes, st.floats(0.05, 1.0))
def test_no_share_is_larger_than_allowed_and_the_cap_is_the_highest_possible(numbers: list[int], share: float) -> None:
    replies = [Reply.of(f"s{i}", torch.zeros(1), n) for i, n in enumerate(numbers)]
    capped = [reply.report.examples for reply in with_share(replies, share)]
    total, positive = sum(capped), [n for n in numbers if n > 0]
    assert all(c <= n for c, n in zip(capped, numbers, strict=True))
    lowered = {c for c, n in zip(capped, numbers, strict=True) if c < n}
    assert len(lowered) <= 1  # all have the same cap
    if positive and share * len(positive) >= 1 + 1e-9:
        assert max(capped) <= share * total * (1 + 1e-9)
        for cap in lowered:  # a higher cap would exceed the share
            higher = [min(n, cap * 1.01 + 1e-6) for n in numbers]
            assert max(higher) > share * sum(higher) * (1 - 1e-9)
    elif positive and lowered:
        assert max(capped) == min(positive)


def test_invalid_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_norm is 0; use a number above 0"):
        Policy(max_norm=0)
    with pytest.raises(ValueError, match=r"max_growth is 0\.5; use a factor of at least 1"):
        Policy(max_growth=0.5)


def federation(hostile_rounds: range, claims: int = 10) -> LocalGrid:
    """Five clients with updates of norm 1 and 10 examples; number 3 sends NaN in `hostile_rounds`, else claims more."""

    def client(message: Message, context: Context) -> Message:
        sent: Any = message.content
        (config,) = [r for r in sent.values() if isinstance(r, ConfigRecord)]
        number = int(config["server-round"])  # type: ignore[arg-type]
        is_hostile = context.node_config["partition-id"] == 3
        if message.metadata.message_type == "evaluate":
            examples: Any = -1 if is_hostile and number in hostile_rounds else 10
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": examples})}), reply_to=message)
        (arrays,) = [r for r in sent.values() if isinstance(r, ArrayRecord)]
        w = to_state(arrays)["w"] + torch.tensor([1.0, 0.0])
        if is_hostile and number in hostile_rounds:
            w = w * torch.nan
        content = RecordDict({"arrays": to_arrays({"w": w}), "metrics": MetricRecord({"num-examples": 10})})
        if is_hostile:
            content["metrics"]["num-examples"] = claims  # type: ignore
        return Message(content, reply_to=message)

    return LocalGrid(client, 5)


def start(policy: Policy, grid: LocalGrid, rounds: int, evaluate: float = 0.0) -> list[Any]:
    records: list[Any] = []
    strategy = FlowerStrategy(FedAvg(), policy=policy, fraction_evaluate=evaluate, on_round=records.append)
    strategy.start(grid, ArrayRecord({"w": Array(torch.zeros(2).numpy())}), num_rounds=rounds)
    return records


def test_after_its_strikes_a_site_is_left_out_for_some_rounds() -> None:
    records = start(Policy(max_strikes=2, quarantine_rounds=3), federation(range(1, 3)), 7)
    codes = [next(v.code for v in record.verdicts if v.node == "client-3") for record in records]
    assert codes == ["not-finite", "not-finite", "quarantined", "quarantined", "quarantined", "admitted", "admitted"]
    reason = next(v.reason for v in records[2].verdicts if v.node == "client-3")
    assert reason == "client-3: too many of its replies were rejected; it is asked again in round 6."


def test_offences_in_evaluation_count() -> None:
    records = start(Policy(max_strikes=2, quarantine_rounds=2), federation(range(1, 2)), 3, evaluate=1.0)
    codes = [next(v.code for v in record.verdicts if v.node == "client-3") for record in records]
    assert codes == ["not-finite", "quarantined", "quarantined"]
    assert [v.node for v in records[1].evaluations] == ["client-0", "client-1", "client-2", "client-4"]


def test_a_share_is_the_largest_weight_in_the_record() -> None:
    (record,) = start(Policy(max_share=0.3), federation(range(0), claims=10**9), 1)
    weights = {v.node: v.weight for v in record.verdicts}
    assert weights["client-3"] == pytest.approx(0.3)
    assert weights["client-0"] == pytest.approx(0.175)
