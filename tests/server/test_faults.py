"""Faults that users found in the server, one test each with the right value."""

from __future__ import annotations

import inspect
import pickle
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Journal, NoReplyAdmitted, RunFailed
from corymb.server.rounds.run_failed import noted
from corymb.simulations import LocalGrid
from corymb.strategies import Bulyan, Cohort, FedAvg, Krum, Mix, SightedRule, TrimmedMean

MODEL = {"w": torch.zeros(4)}


def client(
    state: Callable[[int], dict[str, torch.Tensor]] = lambda node: {"w": torch.full((4,), node + 1.0)},
    metrics: Callable[[int], dict[str, Any]] = lambda node: {"num-examples": 1},
) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        content = RecordDict({"metrics": MetricRecord(metrics(node))})
        if message.metadata.message_type == "train":
            content["arrays"] = to_arrays(state(node))
        return Message(content, reply_to=message)

    return answer


def run(strategy: FlowerStrategy, app: Any, nodes: int = 3, rounds: int = 1, model: Any = None) -> Any:
    return strategy.start(LocalGrid(app, nodes), to_arrays(MODEL if model is None else model), num_rounds=rounds)


def test_s2_flower_cannot_misread_bfloat16() -> None:
    """The bits of .5 are 16128; code without bfloat16 must fail instead of reading that number."""
    record = to_arrays({"w": torch.tensor([0.5], dtype=torch.bfloat16)})
    with pytest.raises(TypeError, match="numpy has no bfloat16"):
        record["w"].numpy()
    sent = ArrayRecord({"w": pickle.loads(pickle.dumps(record["w"]))})
    with pytest.raises(TypeError, match="numpy"):
        sent.to_torch_state_dict()
    assert to_state(sent)["w"].tolist() == [0.5]


def test_s3_a_model_without_float_tensors_is_refused() -> None:
    counts = {"counts": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match="no tensor of floating-point numbers"):
        run(FlowerStrategy(FedAvg()), client(lambda node: counts), model=counts)


def test_s3_integer_tensors_beside_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = MODEL | {"counts": torch.zeros(3, dtype=torch.int64), "bn.num_batches_tracked": torch.tensor(0)}
    caplog.set_level("WARNING", "flwr")
    run(FlowerStrategy(FedAvg()), client(lambda node: model), model=model)
    assert any("keeps its own: counts." in message for message in caplog.messages)


def test_s6_a_mean_says_over_how_many_clients_it_is(tmp_path: Path) -> None:
    """Losses .3, NaN, NaN: the mean is .3, over one client, and the others are named, in the journal, too."""
    strategy = FlowerStrategy(FedAvg(), journal=Journal(tmp_path))
    app = client(metrics=lambda node: {"num-examples": 5, "loss": 0.3 if node == 0 else float("nan")})
    run(strategy, app)
    (record,) = Journal(tmp_path).rounds()
    assert record.evaluate == {"loss": pytest.approx(0.3), "loss-clients": 1.0}
    assert [v.reason for v in record.evaluations] == [
        "",
        "client-1: metrics left out, as each is not one finite number or there are too many: loss.",
        "client-2: metrics left out, as each is not one finite number or there are too many: loss.",
    ]


def test_q3_each_evaluation_has_a_verdict(tmp_path: Path) -> None:
    def fails(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 1:
            raise RuntimeError("no test data")
        return client()(message, context)

    run(FlowerStrategy(FedAvg(), journal=Journal(tmp_path)), fails)
    (record,) = Journal(tmp_path).rounds()
    assert [v.code for v in record.evaluations] == ["admitted", "error", "admitted"]
    assert "no test data" in record.evaluations[1].reason


@dataclass(frozen=True)
class Dice(SightedRule[None]):
    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        weights = torch.rand(len(cohort.nodes), dtype=torch.float64) + np.random.rand()
        return Mix(cohort.mixed(weights / weights.sum()), weights=weights / weights.sum())


def test_s17_a_rule_that_draws_does_not_depend_on_what_clients_draw() -> None:
    def draws(message: Message, context: Context) -> Message:
        torch.manual_seed(3)
        torch.rand(7)
        return client()(message, context)

    models = [run(FlowerStrategy(Dice(), seed=4), app, rounds=2).arrays for app in (client(), draws)]
    assert torch.equal(*(to_state(arrays)["w"] for arrays in models))


@pytest.mark.parametrize(
    ("rule", "nodes", "enough"),
    [(Bulyan(hostile=1), 6, 7), (Krum(hostile=1), 4, 5), (Krum(hostile=1, selected=4), 6, 7)],
    ids=["bulyan", "krum", "multi-krum"],
)
def test_f6_a_robust_rule_does_not_lower_its_tolerance_in_silence(rule: Any, nodes: int, enough: int) -> None:
    """With a reply too few, the run keeps the model and fails; the hostile client's 1e6 does not count."""
    strategy = FlowerStrategy(rule)
    message = rf"No reply has counted in 1 round, .* {nodes} admitted \(the rule needs more replies\)"
    with pytest.raises(NoReplyAdmitted, match=message):
        run(strategy, client(lambda node: {"w": torch.full((4,), 1e6 if node == 0 else 1.0)}), nodes)
    assert strategy.state.model.parameters.tolist() == [0.0] * 4
    assert strategy.record.notes["too-few-replies"] == nodes
    result = run(FlowerStrategy(rule), client(lambda node: {"w": torch.full((4,), 1e6 if node == 0 else 1.0)}), enough)
    assert to_state(result.arrays)["w"].tolist() == [1.0] * 4


def test_f6_the_record_has_what_a_trimmed_mean_trimmed() -> None:
    strategy = FlowerStrategy(TrimmedMean(0.2))
    run(strategy, client(), 4)
    assert strategy.record.notes["trimmed"] == 0
    assert TrimmedMean(0.29).tolerates(100) == 29


def test_f8_fractional_weights() -> None:
    strategy = FlowerStrategy(FedAvg(), weighted_by_key="share")
    result = run(strategy, client(metrics=lambda node: {"share": (node + 1) / 6}))
    assert to_state(result.arrays)["w"].tolist() == pytest.approx([14 / 6] * 4)


def test_f8_metrics_that_are_lists_are_averaged_entry_by_entry() -> None:
    metrics = {0: [0.1, 0.2], 1: [0.3, 0.6], 2: [0.5, 1.0]}
    strategy = FlowerStrategy(FedAvg())
    result = run(strategy, client(metrics=lambda node: {"num-examples": 1 + node, "recall": metrics[node]}))
    mean = result.train_metrics_clientapp[1]["recall"]
    assert mean == pytest.approx([(0.1 + 2 * 0.3 + 3 * 0.5) / 6, (0.2 + 2 * 0.6 + 3 * 1.0) / 6])
    assert strategy.record.admitted[1].metrics == {"recall[0]": 0.3, "recall[1]": 0.6}


def test_f8_an_entry_that_is_no_number_is_named() -> None:
    strategy = FlowerStrategy(FedAvg())
    run(strategy, client(metrics=lambda node: {"num-examples": 1, "recall": [0.1, float("nan")]}))
    assert all("recall[1]" in verdict.reason for verdict in strategy.record.admitted)


@pytest.mark.parametrize(("nodes", "fraction"), [(7, 0.5), (10, 0.05), (3, 0.9), (4, 1.0), (5, 0.0)])
def test_f11_as_many_nodes_as_flower_asks(nodes: int, fraction: float) -> None:
    class Counting(LocalGrid):
        pushed = 0

        def push_messages(self, messages: Any) -> list[str]:
            messages = list(messages)
            self.pushed += len(messages)
            return super().push_messages(messages)

    counts = []
    for kind in (lambda **options: FlowerStrategy(FedAvg(), **options), flower.FedAvg):
        grid = Counting(client(), nodes)
        kind(fraction_train=fraction, fraction_evaluate=0.0, min_available_nodes=1).start(
            grid, to_arrays(MODEL), num_rounds=1
        )
        counts.append(grid.pushed)
    assert counts[0] == counts[1]


def test_f12_every_argument_of_flowers_fedavg_exists() -> None:
    ours, flowers = (set(inspect.signature(kind.__init__).parameters) for kind in (FlowerStrategy, flower.FedAvg))
    assert flowers <= ours


def test_f12_flowers_arguments_are_accepted() -> None:
    def largest(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"largest": max(cast(float, c.metric_records["metrics"][key]) for c in contents)})

    strategy = FlowerStrategy(
        FedAvg(),
        min_train_nodes=3,
        min_evaluate_nodes=3,
        fraction_train=0.1,
        fraction_evaluate=0.1,
        train_metrics_aggr_fn=largest,
        evaluate_metrics_aggr_fn=largest,
    )
    result = run(strategy, client(metrics=lambda node: {"num-examples": node + 1}), 3)
    assert dict(result.train_metrics_clientapp[1]) == dict(result.evaluate_metrics_clientapp[1]) == {"largest": 3.0}


def test_a_resumed_run_returns_the_metrics_that_it_returned_before(tmp_path: Path) -> None:
    def both(contents: list[RecordDict], key: str) -> MetricRecord:
        numbers = [cast(float, c.metric_records["metrics"][key]) for c in contents]
        return MetricRecord({"largest": max(numbers), "two": [min(numbers), max(numbers)]})

    def histories(rounds: int) -> list[dict[str, object]]:
        with closing(Journal(tmp_path)) as journal:
            options: Any = {"train_metrics_aggr_fn": both, "evaluate_metrics_aggr_fn": both}
            strategy = FlowerStrategy(FedAvg(), journal=journal, resume=True, **options)
            result = run(strategy, client(metrics=lambda node: {"num-examples": node + 1}), rounds=rounds)
        return [dict(h[1]) for h in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp)]

    expected = {"largest": 3.0, "two": [1.0, 3.0]}
    assert histories(1) == histories(2) == [expected, expected]


def test_f10_the_contract_of_start() -> None:
    """No timeout; a config with a list, of which each message has its own copy; a message to an unknown node."""

    class Odd(FlowerStrategy):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
            config["seen"] = cast(int, config.get("seen", 0)) + 1
            messages = super().configure_train(server_round, arrays, config, grid)
            return [*messages, Message(messages[0].content, 99, "train")]

    def changes_its_config(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            config = next(record for record in message.content.values() if isinstance(record, ConfigRecord))
            assert config["lr"] == [0.1]
            assert config["seen"] == config["server-round"]
            cast(list[float], config["lr"]).append(0.2)
        return client()(message, context)

    strategy = Odd(FedAvg())
    config = ConfigRecord({"lr": [0.1]})
    strategy.start(LocalGrid(changes_its_config, 3), to_arrays(MODEL), 2, None, config)
    assert [v.code for v in strategy.record.verdicts if v.node.startswith("client")] == ["admitted"] * 3


def test_q2_a_run_in_which_nobody_counted_is_an_error() -> None:
    double = {"w": torch.zeros(4, dtype=torch.float64)}
    with pytest.raises(NoReplyAdmitted, match=r"in 2 rounds, so the model did not change.* 3 dtype.*For example"):
        run(FlowerStrategy(FedAvg()), client(lambda node: double), rounds=2)


def test_q12_a_journal_of_another_version_is_one_clear_sentence(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        database.execute("CREATE TABLE rounds (round INTEGER PRIMARY KEY)")
    with pytest.raises(ValueError, match="has tables of version 0, and this Corymb reads version 5"):
        Journal(tmp_path)


@pytest.mark.parametrize("wrong", [FedAvg, "fedau", None])
def test_a_rule_that_is_not_one_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"pass an instance of a rule, such as FedAU\(\)"):
        FlowerStrategy(wrong)


def test_a_run_that_fails_says_why_even_if_the_disk_is_full() -> None:
    class FullDisk:
        def note(self, entries: Mapping[str, str]) -> None:
            raise sqlite3.OperationalError("database or disk is full")

    error = RunFailed("No reply was admitted.")
    assert noted(error, FullDisk()) is error  # type: ignore[arg-type]
