"""Candidate elections in which clients elect a round's model, in federations within the test process."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from hypothesis import given
from hypothesis import strategies as st

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.records import of_kind
from corymb.server import CandidateElection, FlowerStrategy, RoundRecord
from corymb.server.rounds.candidate_election import elected
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg, Median

SITES = 7


def federation(hostile: int = 0, liars: int = 0) -> LocalGrid:
    """Clients that train towards 1 and whose loss is the distance to 1.

    The first `hostile` clients send 100 instead; the first `liars` report the negative distance.
    """
    app = ClientApp()

    def model(message: Message) -> torch.Tensor:
        from flwr.app import ArrayRecord

        return to_state(of_kind(message.content, ArrayRecord)[0])["w"]

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        w = torch.full((2,), 100.0) if site < hostile else model(message) + 0.5 * (1 - model(message))
        content = {"arrays": to_arrays({"w": w}), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        loss = float((model(message) - 1).norm())
        if int(context.node_config["partition-id"]) < liars:
            loss = -loss
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return LocalGrid(app, SITES)


def learned(
    election: CandidateElection | None, start: Any = FlowerStrategy.start, **grid: int
) -> tuple[float, list[RoundRecord]]:
    records: list[RoundRecord] = []
    strategy = FlowerStrategy(FedAvg(), candidate_election=election, fraction_evaluate=0, on_round=records.append)
    result = start(strategy, federation(**grid), to_arrays({"w": torch.zeros(2)}), num_rounds=4)
    return float(to_state(result.arrays)["w"][0]), records


def test_honest_clients_elect_the_rules_model() -> None:
    model, records = learned(CandidateElection())
    assert 0.9 < model < 1
    assert [record.notes["elected"] for record in records] == [0] * 4
    assert all(record.notes["elected-certificate"] == (SITES - 1) // 2 for record in records)


def test_a_poisoned_aggregate_is_rolled_back() -> None:
    assert learned(None, hostile=2)[0] > 10
    model, records = learned(CandidateElection(), hostile=2, liars=2)
    assert model == 0  # the model before the round is the only other candidate
    assert [record.notes["elected"] for record in records] == [1] * 4


def test_a_better_model_of_another_rule_is_elected() -> None:
    model, records = learned(CandidateElection((Median(),)), hostile=2, liars=2)
    assert 0.9 < model < 1
    assert [record.notes["elected"] for record in records] == [1] * 4


def test_the_result_is_the_same_under_flowers_start() -> None:
    expected = learned(CandidateElection((Median(),)), hostile=2, liars=2)[0]
    assert learned(CandidateElection((Median(),)), start=Strategy.start, hostile=2, liars=2)[0] == expected


def test_without_reports_there_is_no_choice() -> None:
    assert CandidateElection().choose([[], []]) is None


@given(data=st.data(), voters=st.integers(1, 7), candidates=st.integers(2, 4))
def test_liars_within_the_certificate_change_nothing(data: st.DataObject, voters: int, candidates: int) -> None:
    number = st.floats(0, 10)
    losses = [{c: data.draw(number) for c in range(candidates)} for _ in range(voters)]
    choice = elected(losses, candidates)
    hostile = data.draw(st.lists(st.integers(0, voters - 1), max_size=choice.certificate, unique=True))
    for voter in hostile:
        losses[voter] = {c: data.draw(number) for c in range(candidates) if data.draw(st.booleans())}
    assert elected(losses, candidates).candidate == choice.candidate
