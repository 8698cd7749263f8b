"""A client's arrays in a block are a record like any other, and are written out no sooner than somebody looks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from corymb.protocol.block import BlockArrays
from corymb.protocol.codec import Array, to_state
from corymb.protocol.flower import inside_task, quick_messages, quick_metrics, quick_record, quick_reply, stamp
from corymb.strategies import Layout
from corymb.strategies.block import Wanted

STATE = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}


class Written:
    clients = 1
    looked = 0

    def moves(self, weights: Tensor, origin: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("nobody asked for a sum")

    def squares(self, centre: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("nobody asked for distances")

    def write(self, into: Wanted) -> Callable[[], None]:
        raise AssertionError("nobody asked for all of them")

    def model(self, index: int) -> tuple[Tensor, ...]:
        self.looked += 1
        return torch.tensor([1.0, 2.0]), torch.tensor([3.0])


def record() -> BlockArrays:
    return BlockArrays(Written(), 0, Layout.of(STATE), 3.0)


def test_it_is_a_record() -> None:
    for view in (record(), record().copy()):
        assert isinstance(view, ArrayRecord)
        assert list(view) == list(view.keys()) == ["weight", "bias"]
        assert len(view) == len(list(view.values())) == 2
        assert "bias" in view
        state = to_state(view)
        assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
        assert view["bias"].numpy().tolist() == [3.0]
    assert "weight" in repr(record())


def test_nobody_looks_before_it_is_read() -> None:
    mine = record()
    block = mine.place.block
    assert isinstance(block, Written)
    assert mine.fits(Layout.of(STATE))
    assert block.looked == 0
    assert to_state(mine)
    assert block.looked > 0


def test_what_is_changed_is_no_longer_the_block_s() -> None:
    mine = record()
    mine["bias"] = Array(torch.tensor([9.0]))
    assert not mine.fits(Layout.of(STATE))
    assert to_state(mine)["bias"].tolist() == [9.0]
    assert len(mine) == 2
    del mine["weight"]
    assert list(mine) == ["bias"]


def test_quick_messages_are_flower_s_own() -> None:
    """What is made without checks is what Flower's constructors make."""
    inside_task(1, 1)
    content = RecordDict({"metrics": quick_metrics({"loss": 0.5, "steps": 3})})
    assert quick_record({"metrics": content["metrics"]}) == content  # type: ignore[dict-item]
    quick = quick_messages(content, [5, 6], "train", "7")
    for message, node in zip(quick, (5, 6), strict=True):
        slow = Message(content, node, "train", group_id="7")
        mine, theirs = message.metadata.__dict__, slow.metadata.__dict__
        assert {**mine, "_created_at": 0} == {**theirs, "_created_at": 0}
        stamp(message, f"m{node}")
        answer = quick_reply(message, content=content)
        expected = Message(content, reply_to=message)
        for name in ("src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type", "run_id"):
            assert getattr(answer.metadata, name) == getattr(expected.metadata, name)
        assert answer.has_content()
        assert not answer.has_error()
