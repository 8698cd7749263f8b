"""Hostile and broken replies, each from one of six nodes: only that reply is rejected."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flwr.app
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from corymb.protocol.codec import to_arrays, to_state
from corymb.server import FlowerStrategy, Journal
from corymb.server.rounds.door import Door
from corymb.server.rounds.rejections import Rejection
from corymb.simulations.grid.local_grid import LocalGrid
from corymb.strategies import FedAvg, Layout, Reply
from corymb.tests.support import NEEDED, RULES_WITHOUT_PROXY, content, reply

SIZE = 1_000_000  # 4 MB of float32, so that an extra copy is visible in the memory use
HOSTILE = 3
CLIENTS = 8


def good() -> dict[str, torch.Tensor]:
    return {"w": torch.full((SIZE,), 2.0), "b": torch.ones(3), "n": torch.tensor(4)}


def with_array(name: str, array: Array) -> RecordDict:
    sent = content(good())
    sent.array_records["arrays"][name] = array
    return sent


def huge() -> Array:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40},), }}".encode()
    return Array("float32", (SIZE,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def truncated() -> Array:
    whole = flwr.app.Array(good()["w"].numpy())
    return Array(whole.dtype, whole.shape, whole.stype, whole.data[:-1000])


def without(name: str) -> RecordDict:
    state = good()
    del state[name]
    return content(state)


def unchecked(examples: Any) -> RecordDict:
    """Return a content whose number of examples bypasses Flower's own checks."""
    sent = content(good())
    sent["metrics"].__dict__["_data"]["num-examples"] = examples
    return sent


ATTACKS: dict[str, tuple[Callable[[], RecordDict], str, str]] = {
    "a NaN model": (
        lambda: content(good() | {"b": torch.tensor([1, float("nan"), 1])}),
        "not-finite",
        "tensor 'b'",
    ),
    "an infinite model": (
        lambda: content(good() | {"w": torch.full((SIZE,), torch.inf)}),
        "not-finite",
        "tensor 'w'",
    ),
    "a finite model too large": (lambda: content(good() | {"w": torch.full((SIZE,), 1e37)}), "not-finite", "1e.20"),
    "a weight beyond floats": (lambda: unchecked(10**400), "examples", "whole number"),
    "an infinite weight": (lambda: content(good(), float("inf")), "examples", "is inf"),
    "a NaN weight": (lambda: content(good(), float("nan")), "examples", "is nan"),
    "a negative weight": (lambda: content(good(), -499), "examples", "is -499"),
    "a weight of 1e18": (lambda: content(good(), 1e18), "examples", r"is 1e\+18"),
    "half an example": (lambda: content(good(), 0.5), "examples", "is 0.5"),
    "a list as weight": (lambda: content(good(), [1, 2]), "examples", r"is \[1, 2\]"),
    "a wrong shape": (lambda: content(good() | {"b": torch.ones(1)}), "shape", r"\[1\], not \[3\]"),
    "a wrong dtype": (lambda: content(good() | {"b": torch.ones(3).double()}), "dtype", "float64"),
    "a missing tensor": (lambda: without("b"), "names", "'b' is missing"),
    "a missing buffer": (lambda: without("n"), "names", "'n' is missing"),
    "one tensor more": (lambda: content(good() | {"x\n": torch.ones(1)}), "names", "not in the model"),
    "a truncated array": (lambda: with_array("w", truncated()), "bytes", "carries 3999000 bytes"),
    "a header of 4 TiB": (lambda: with_array("w", huge()), "bytes", "1099511627776"),
    "garbage": (
        lambda: with_array("w", Array("float32", (SIZE,), "numpy.ndarray", b"?" * 99)),
        "bytes",
        "not an .npy",
    ),
    "no metrics": (
        lambda: RecordDict({"arrays": to_arrays(good())}),
        "records",
        "0 records of the type MetricRecord",
    ),
    "no model": (
        lambda: RecordDict({"metrics": MetricRecord({"num-examples": 1})}),
        "records",
        "ArrayRecord",
    ),
    "two models": (lambda: RecordDict({**content(good()), "more": ArrayRecord()}), "records", "2 records"),
}


def federation(attack: Callable[[], RecordDict] | None) -> LocalGrid:
    """Make a grid of eight clients, enough for every rule. One attacks, or sends an error reply if `attack` is None."""

    def site(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        if number != HOSTILE:
            return Message(content(good() | {"b": torch.full((3,), float(number))}, 1 + number), reply_to=message)
        if attack is None:
            return Message(Error(2, "crashed"), reply_to=message)
        return Message(attack(), reply_to=message)

    return LocalGrid(site, CLIENTS)


def peak_growth(work: Callable[[], Any]) -> int:
    """Return the peak growth of the process's memory during `work`, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_is_that_of_the_five_honest_sites(name: str, tmp_path: Path) -> None:
    attack, code, reason = ATTACKS[name]
    models = []
    for kind in (attack, None):
        journal = Journal(tmp_path / str(kind is None))
        strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0, journal=journal)
        result = strategy.start(federation(kind), to_arrays(good()), num_rounds=1)
        models.append(to_state(result.arrays))
        (record,) = journal.rounds()
        journal.close()
        assert [v.node for v in record.admitted] == [f"client-{i}" for i in range(CLIENTS) if i != HOSTILE]
        if kind is attack:
            (verdict,) = [v for v in record.verdicts if v.code != "admitted"]
            assert (verdict.node, verdict.code) == (f"client-{HOSTILE}", code)
            assert verdict.reason.startswith(f"client-{HOSTILE}: ")
            assert re.search(reason, verdict.reason), verdict.reason
            assert "\n" not in verdict.reason
    attacked, honest = models
    assert all(torch.equal(attacked[entry], honest[entry]) for entry in honest)


@pytest.mark.parametrize("rule", RULES_WITHOUT_PROXY)
def test_every_rule_is_protected_by_the_door(rule: str) -> None:
    models = []
    for attack in (ATTACKS["a NaN model"][0], None):
        strategy = FlowerStrategy(RULES_WITHOUT_PROXY[rule], fraction_evaluate=0)
        models.append(to_state(strategy.start(federation(attack), to_arrays(good()), num_rounds=2).arrays))
    assert all(torch.equal(models[0][entry], models[1][entry]) for entry in models[1])


def test_false_headers_do_not_allocate_memory() -> None:
    door = Door(Layout.of(good()))
    for name in ("a header of 4 TiB", "a truncated array", "garbage", "a wrong shape", "an infinite model"):
        message = reply(1000, ATTACKS[name][0]())
        assert peak_growth(partial(door.admit, "x", message)) < 4 * SIZE, name
    federated = federation(ATTACKS["a header of 4 TiB"][0])
    strategy = FlowerStrategy(FedAvg(), fraction_evaluate=0)
    assert peak_growth(lambda: strategy.start(federated, to_arrays(good()), num_rounds=1)) < 10 * 4 * SIZE


def test_a_good_reply_is_admitted_without_a_copy() -> None:
    state = good()
    admitted = Door(Layout.of(state)).admit("a", reply(1000, content(state, 5, accuracy=0.5, bad=float("nan"))))
    assert isinstance(admitted, Reply)
    assert admitted.parts[0].data_ptr() == state["w"].data_ptr()
    assert admitted.report.examples == 5
    assert admitted.report.metrics == {"accuracy": 0.5, **NEEDED}  # a bad metric drops the metric, not the update


STEPS = {"w": torch.full((2, SIZE), 0.5), "b": torch.ones(2, 3)}


def with_steps(steps: dict[str, torch.Tensor]) -> RecordDict:
    sent = content(good())
    sent["steps"] = to_arrays(steps)
    return sent


def test_updates_of_batches_are_read_if_the_rule_wants_them() -> None:
    admitted = Door(Layout.of(good()), wants_batch_updates=lambda node: node == "a").admit(
        "a", reply(1000, with_steps(STEPS))
    )
    assert isinstance(admitted, Reply)
    assert admitted.steps is not None
    assert admitted.steps.shape == (2, SIZE + 3)
    for verdict in (
        Door(Layout.of(good())).admit("a", reply(1000, with_steps(STEPS))),  # by default, no node's steps are read
        Door(Layout.of(good()), wants_batch_updates=lambda node: node == "b").admit(
            "a", reply(1000, with_steps(STEPS))
        ),
    ):
        assert isinstance(verdict, Reply)
        assert verdict.steps is None
    assert admitted.steps[:, -4:].tolist() == [[0.5, 1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ({"b": STEPS["b"], "w": STEPS["w"]}, "does not have the model's parameters in the same order"),
        ({"w": STEPS["w"], "b": torch.ones(3, 3)}, r"tensor 'b' in 'steps' is not torch.float32 \[2, 3\]"),
        ({"w": STEPS["w"], "b": torch.ones(2, 3).double()}, "tensor 'b' in 'steps' is not torch.float32"),
        ({"w": torch.zeros(0, SIZE), "b": torch.zeros(0, 3)}, "has 0 batches, not 1 to 256"),
        ({"w": torch.zeros(257, SIZE)[:, :1].expand(257, SIZE), "b": torch.zeros(257, 3)}, "has 257 batches"),
        ({"w": STEPS["w"], "b": torch.full((2, 3), torch.nan)}, "tensor 'b' in 'steps' has NaN"),
    ],
    ids=["order", "shape", "dtype", "none", "many", "nan"],
)
def test_wrong_updates_of_batches_are_rejected(steps: dict[str, torch.Tensor], reason: str) -> None:
    verdict = Door(Layout.of(good()), wants_batch_updates=lambda node: node == "a").admit(
        "a", reply(1000, with_steps(steps))
    )
    assert isinstance(verdict, Rejection)
    assert re.search(reason, verdict.reason), verdict.reason


def test_the_number_and_names_of_metrics_are_bounded() -> None:
    names = {f"metric-{i}": 1.0 for i in range(5000)} | {"fake\n\x1b[31mline": 1.0, "x" * 101: 1.0, "huge": 9e298}
    report = Door(Layout.of({})).admit_metrics("a", reply(1000, content({}, 1, **names)))
    assert not isinstance(report, Rejection)
    assert len(report.metrics) == 100
    assert all(name.startswith("metric-") for name in report.metrics.keys() - NEEDED.keys())
    classes = {f"examples-of-class-{c}": 1.0 for c in range(5000)}
    report = Door(Layout.of({})).admit_metrics("a", reply(1000, content({}, 1, **classes, participation=0.5)))
    assert not isinstance(report, Rejection)
    assert len(report.metrics) == 1001 + len(NEEDED)
    assert report.metrics["participation"] == 0.5


def test_an_unforeseen_error_rejects_only_its_reply() -> None:
    sent = content({"w": torch.zeros(3)})
    sent.array_records["arrays"]["w"].__dict__["shape"] = None
    verdict = Door(Layout.of({"w": torch.zeros(3)})).admit("a", reply(1000, sent))
    assert isinstance(verdict, Rejection)
    assert verdict.code == "records"


@given(st.binary(max_size=200), st.sampled_from(("float32", "int64", "nonsense")), st.integers(-1, 3))
def test_no_reply_can_raise(noise: bytes, dtype: str, size: int) -> None:
    layout = Layout.of({"w": torch.zeros(3)})
    sent = content({"w": torch.zeros(3)})
    sent.array_records["arrays"]["w"] = Array(dtype, (size,), "numpy.ndarray", noise)
    assert isinstance(Door(layout).admit("x", reply(1000, sent)), Rejection)


def test_text_from_a_client_cannot_break_the_log() -> None:
    message = reply(1000, content({}))
    failing = Message(Error(2, "x" * 5000 + "\x1b[31m\nfake line"), reply_to=message)
    verdict = Door(Layout.of({})).admit("a", failing)
    assert isinstance(verdict, Rejection)
    assert len(verdict.reason) < 300
    assert verdict.reason.isprintable()
