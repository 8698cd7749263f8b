"""Each attack against its formula, on clients whose training is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from pydantic import TypeAdapter

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.flower import set_message_id, set_task_identity
from corymb.server import Journal
from corymb.simulations.data.attacks import AttackSettings
from corymb.simulations.data.clients import IndexedReplies, Request
from corymb.simulations.data.colluding_attacks import largest_hidden_shift
from corymb.simulations.data.data_attacks import Backdoor, FlippedLabels
from corymb.simulations.data.examples import Examples
from corymb.simulations.experiments.experiment import Experiment
from corymb.tests.support import run_rule, scenario_of_seed

SENT = torch.tensor([1.0, 2.0, 3.0])
UPDATES = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -2.0], [0.5, 0.5, 0.5], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
HOSTILE = (0, 1)


class Trained:
    """Clients whose update is row k of `UPDATES`, and whose number of examples is k + 1."""

    def __call__(self, message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        state = {"w": SENT + UPDATES[client], "n": torch.tensor(7)}
        metrics = MetricRecord({"num-examples": client + 1, "loss": 0.5})
        return Message(RecordDict({"arrays": to_arrays(state), "metrics": metrics}), reply_to=message)

    def train_together(self, requests: Sequence[Request]) -> IndexedReplies:
        return iter([(index, self(*request)) for index, request in reversed(list(enumerate(requests)))])


def sent_under(server_round: int = 1, **attack: Any) -> list[tuple[torch.Tensor, float]]:
    """Return the model and the number of examples that each client sends under an attack."""
    set_task_identity(run_id=1, node_id=1)
    requests = []
    for client in range(len(UPDATES)):
        config = ConfigRecord({"server-round": server_round})
        message = Message(
            RecordDict({"arrays": to_arrays({"w": SENT, "n": torch.tensor(7)}), "config": config}), 1, "train"
        )
        set_message_id(message, f"m-{client}")
        node_config: dict[str, Any] = {"partition-id": client, "name": f"client-{client}"}
        requests.append((message, Context(1, 1, node_config, RecordDict(), {})))
    app: Any = TypeAdapter(AttackSettings).validate_python({"clients": 2, **attack}).wrap(Trained(), HOSTILE, 3)
    replies: Iterator[tuple[int, Message]] = app.train_together(requests)
    found = {}
    for index, reply in replies:
        assert reply.metadata.reply_to_message_id == f"m-{index}"
        (arrays,) = [record for record in reply.content.values() if isinstance(record, ArrayRecord)]
        (metrics,) = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
        state = to_state(arrays)
        assert state["n"] == 7
        found[index] = (state["w"], float(metrics["num-examples"]))  # type: ignore[arg-type]
    assert sorted(found) == list(range(len(UPDATES)))
    return [found[index] for index in range(len(UPDATES))]


def test_alie_by_hand() -> None:
    """Five clients, two hostile: s = 3 - 2 = 1, and z is the quantile of (3 - 1) / 3."""
    z = NormalDist().inv_cdf(2 / 3)
    assert largest_hidden_shift(5, 2) == pytest.approx(z)
    assert largest_hidden_shift(50, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26))  # the paper's example: 1.43
    assert largest_hidden_shift(3, 2) == 0
    expected = SENT + torch.tensor([2 - z, 0.0, 0 - 2 * z])
    sent = sent_under(kind="alie")
    for client in HOSTILE:
        torch.testing.assert_close(sent[client][0], expected)
    by_hand = sent_under(kind="alie", deviations=1.5)
    torch.testing.assert_close(by_hand[0][0], SENT + torch.tensor([0.5, 0.0, -3.0]))


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ({"kind": "sign_flip"}, [[0.0, 2.0, 1.0], [-2.0, 2.0, 5.0]]),
        ({"kind": "scaling", "scale": 10.0}, [[11.0, 2.0, 23.0], [31.0, 2.0, -17.0]]),
        ({"kind": "ipm", "scale": 0.5}, [[0.0, 2.0, 3.0], [0.0, 2.0, 3.0]]),
        ({"kind": "replay"}, [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]),
    ],
)
def test_models_by_hand(attack: dict[str, Any], expected: list[list[float]]) -> None:
    sent = sent_under(**attack)
    for client in HOSTILE:
        torch.testing.assert_close(sent[client][0], torch.tensor(expected[client]))


@pytest.mark.parametrize("kind", ["alie", "ipm", "copies", "nan", "replay", "scaling", "inflated_weight", "gaussian"])
def test_honest_clients_send_what_they_have_trained(kind: str) -> None:
    sent = sent_under(kind=kind)
    for client in range(2, len(UPDATES)):
        assert torch.equal(sent[client][0], SENT + UPDATES[client])
        assert sent[client][1] == client + 1


def test_copies_are_equal_and_differ_from_round_to_round() -> None:
    first, second = (sent_under(round_, kind="copies", scale=2.0) for round_ in (1, 2))
    assert torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], second[0][0])


def test_weights_and_nan() -> None:
    assert [examples for _, examples in sent_under(kind="inflated_weight", scale=100.0)] == [100, 200, 3, 4, 5]
    assert all(isnan(number) for number in sent_under(kind="nan")[0][0].tolist())


def test_flipped_labels() -> None:
    store = Examples(torch.zeros(6, 2), torch.tensor([0, 1, 2, 3, 4, 0]))
    poisoned = FlippedLabels(clients=1).poison(store, [np.array([0, 1, 4])], 5, np.random.default_rng(0))
    assert poisoned.targets.tolist() == [4, 3, 2, 3, 0, 0]


def test_the_backdoor_has_a_trigger_in_the_share_of_hostile_examples() -> None:
    store = Examples(torch.zeros(20, 1, 8, 8), torch.arange(20) % 4)
    store.inputs[0, 0, 0, 0] = 0.5
    poisoned = Backdoor(clients=1, share=0.5, target=2).poison(store, [np.arange(10)], 4, np.random.default_rng(0))
    has_trigger = (poisoned.inputs[:, 0, :3, :3] == 0.5).all(dim=(1, 2))
    assert has_trigger[:10].sum() == 5
    assert not has_trigger[10:].any()
    assert (poisoned.targets[has_trigger] == 2).all()
    assert torch.equal(poisoned.targets[~has_trigger], store.targets[~has_trigger])
    test = Backdoor(target=2).test_set(store)
    assert len(test) == 15
    assert (test.targets == 2).all()
    assert (test.inputs[:, 0, :3, :3] == 0.5).all()
    assert (store.inputs[1:] == 0).all()


def attacked(**attack: Any) -> Experiment:
    return Experiment(
        name="attacked", rounds=6, rules=["fedavg"], partition={"kind": "iid", "clients": 6},
        train={"epochs": 3, "batch_size": 16, "learning_rate": 0.1}, attack=attack,
    )  # fmt: skip


def test_a_backdoor_is_learnt_and_its_success_measured(tmp_path: Path) -> None:
    rates = {}
    for clients in (0, 3):
        run_rule(attacked(kind="backdoor", clients=clients, target=1), 0, 0, tmp_path / str(clients))
        journal = Journal(tmp_path / str(clients))
        rates[clients] = list(journal.rounds())[-1].server
        journal.close()
    assert "backdoor" not in rates[0]
    assert rates[3]["backdoor"] > 0.8
    assert rates[3]["accuracy"] > 0.8


def test_a_colluding_attack_needs_an_engine_that_trains_together(tmp_path: Path) -> None:
    experiment = attacked(kind="alie", clients=2).model_copy(update={"engine": "serial"})
    with pytest.raises(ValueError, match=r"attack\.kind = 'alie' needs all hostile clients of a round in one process"):
        run_rule(experiment, 0, 0, tmp_path)


def test_a_backdoor_for_a_class_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"attack\.target = 10 is not one of the 10 classes"):
        scenario_of_seed(attacked(kind="backdoor", clients=1, target=10))
