"""A row of a block of models works as an ArrayRecord, and is read from the block only when the record is read."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from corymb.protocol.codec import Array, to_arrays, to_state
from corymb.protocol.flower import (
    set_message_id,
    set_task_identity,
    unchecked_messages,
    unchecked_metrics,
    unchecked_record,
    unchecked_reply,
)
from corymb.protocol.row_arrays import ModelRow, row_in
from corymb.strategies import Layout

STATE = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
LAYOUT = Layout.of(STATE)


class CountedRows:
    """Rows with one model that count the reads of the model."""

    count = 1
    reads = 0

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        raise AssertionError("add_to must not be called")

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("squared_distances must not be called")

    def copy_to(self, targets: object) -> Callable[[], None]:
        raise AssertionError("copy_to must not be called")

    def pieces(self, row: int) -> tuple[Tensor, ...]:
        self.reads += 1
        return torch.tensor([1.0, 2.0]), torch.tensor([3.0])


def test_a_row_is_an_array_record() -> None:
    record = ModelRow(CountedRows(), 0, LAYOUT, 3.0).to_record({})
    for view in (record, record.copy()):
        assert isinstance(view, ArrayRecord)
        assert list(view) == list(view.keys()) == ["weight", "bias"]
        assert len(view) == len(list(view.values())) == 2
        state = to_state(view)
        assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
        assert view["bias"].numpy().tolist() == [3.0]
    assert pickle.loads(pickle.dumps(record["bias"])).numpy().tolist() == [3.0]


def test_a_row_is_encoded_as_flower_encodes_a_record() -> None:
    row, plain = ModelRow(CountedRows(), 0, LAYOUT, 3.0).to_record({}), to_arrays(STATE)
    assert {name: array.deflate() for name, array in row.items()} == {n: a.deflate() for n, a in plain.items()}


def test_a_row_is_read_only_when_the_record_is_read() -> None:
    rows = CountedRows()
    record = ModelRow(rows, 0, LAYOUT, 3.0).to_record({})
    row = row_in(record, Layout.of(STATE))
    assert row is not None
    assert row.rows is rows
    assert rows.reads == 0
    assert to_state(record)
    assert rows.reads == 2


def test_a_changed_record_is_not_a_row() -> None:
    record = ModelRow(CountedRows(), 0, LAYOUT, 3.0).to_record({})
    other = ModelRow(CountedRows(), 0, LAYOUT, 3.0).to_record({})
    for changed in (
        {"weight": record["weight"], "bias": Array(torch.tensor([9.0]))},
        {"weight": record["weight"], "bias": other["bias"]},
        {"weight": record["weight"]},
        {"bias": record["bias"], "weight": record["weight"], "more": record["bias"]},
        {"bias": record["weight"], "weight": record["bias"]},
    ):
        assert row_in(ArrayRecord(changed), LAYOUT) is None
    assert row_in(record, Layout.of({"weight": torch.zeros(2), "bias": torch.zeros(1)})) is None
    assert row_in(ArrayRecord(), LAYOUT) is None
    assert row_in(record, LAYOUT) is not None


def test_quick_functions_give_what_flowers_constructors_give() -> None:
    set_task_identity(1, 1)
    content = RecordDict({"metrics": unchecked_metrics({"loss": 0.5, "steps": 3})})
    assert unchecked_record({"metrics": content["metrics"]}) == content  # type: ignore[dict-item]
    quick = unchecked_messages(content, [5, 6], "train", "7")
    for message, node in zip(quick, (5, 6), strict=True):
        slow = Message(content, node, "train", group_id="7")
        quick_fields, slow_fields = message.metadata.__dict__, slow.metadata.__dict__
        assert {**quick_fields, "_created_at": 0} == {**slow_fields, "_created_at": 0}
        set_message_id(message, f"m{node}")
        reply = unchecked_reply(message, content=content)
        expected = Message(content, reply_to=message)
        for name in ("src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type", "run_id"):
            assert getattr(reply.metadata, name) == getattr(expected.metadata, name)
        assert reply.has_content()
        assert not reply.has_error()
