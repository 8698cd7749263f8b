from __future__ import annotations

import hashlib
import sys
import time
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.proto import control_pb2
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.flower import (
    CLIENT_APP_RAISED,
    MESSAGE_LOST,
    NODE_UNAVAILABLE,
    empty_run,
    forget_chunks,
    is_simulation,
    node_info,
    set_message_id,
    set_message_ids,
    set_reply_to,
    set_task_identity,
    unchecked_messages,
)
from corymb.protocol.flower_control import ControlError, SuperLink
from corymb.protocol.flower_tasks import MODULE, POLLING, build_bundle, describe_task, load_app, look_often
from corymb.protocol.message_file import from_bytes, to_pieces


def test_flowers_private_api_is_as_expected() -> None:
    assert version("flwr").startswith(("1.41.", "1.42.")), "before allowing another version, run this test with it"
    set_task_identity(run_id=7, node_id=1)
    message = Message(RecordDict(), 42, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 1)
    set_message_id(message, "m-1")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m-1"
    assert empty_run(7).run_id == 7
    node = node_info(42, "site")
    assert (node.node_id, node.name) == (42, "site")
    assert (CLIENT_APP_RAISED, NODE_UNAVAILABLE) == (2, 5)
    assert {3, 4} == MESSAGE_LOST


def test_message_ids_are_those_of_flowers_grid() -> None:
    set_task_identity(run_id=7, node_id=1)
    content = RecordDict({"arrays": to_arrays({"w": torch.arange(3.0)}), "config": ConfigRecord({"a": 1})})
    messages = unchecked_messages(content, [42, 43], "train", "1")
    set_message_ids(messages)
    ids = [message.metadata.message_id for message in messages]
    assert ids == [message.object_id for message in messages]
    assert len(set(ids)) == 2
    forget_chunks(messages[0])
    assert [message.object_id for message in messages] == ids
    reply = Message(RecordDict(), reply_to=messages[0])
    set_reply_to(reply, "m-9")
    assert reply.metadata.reply_to_message_id == "m-9"


def test_a_message_survives_its_way_through_bytes() -> None:
    set_task_identity(run_id=7, node_id=1)
    request = Message(RecordDict(), 42, "train")
    set_message_id(request, "m-1")
    state = {"w": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    content = RecordDict({"arrays": to_arrays(state), "metrics": MetricRecord({"num-examples": 3, "loss": 0.5})})
    again = from_bytes(b"".join(to_pieces(Message(content, reply_to=request))))
    assert again.metadata.reply_to_message_id == "m-1"
    assert again.metadata.src_node_id == 42
    received = to_state(again.content["arrays"])  # type: ignore[arg-type]
    assert received.keys() == state.keys()
    assert all(torch.equal(received[name], state[name]) for name in state)
    assert again.content["metrics"] == content["metrics"]
    failed = from_bytes(b"".join(to_pieces(Message(Error(99, "out of memory"), reply_to=request))))
    assert (failed.error.code, failed.error.reason) == (99, "out of memory")


def test_the_parts_of_flwr_serverapp_are_where_they_are_expected() -> None:
    import_module(MODULE)
    module = sys.modules[MODULE]
    assert callable(module.run_)
    assert callable(import_module("flwr.superlink.cli").flwr_serverapp)
    assert list(signature(import_module("flwr.server.run_serverapp").run).parameters)[:4] == [
        "grid", "context", "server_app_dir", "server_app_attr",
    ]  # fmt: skip
    grid = import_module("flwr.superlink.grid").HttpGrid("127.0.0.1:1", True, None, token="t")
    grid.set_run(empty_run(7))
    set_task_identity(run_id=7, node_id=1)
    task = describe_task(grid, Context(7, 1, {}, RecordDict(), {"a": 1}), "folder", "app")
    assert (task["address"], task["token"], task["app"], task["node"]) == ("127.0.0.1:1", "t", "app", 1)
    assert not is_simulation(grid)
    assert InMemoryGrid.__name__ == "InMemoryGrid"


def test_flower_looks_for_the_parts_of_a_message_as_often_as_it_is_told() -> None:
    pull = import_module("flwr.supercore.inflatable.inflatable_utils").pull_objects
    before = dict(pull.__kwdefaults__)
    modules = [import_module(name) for name in POLLING]
    assert all(module.time is time for module in modules)
    try:
        look_often()
        began = time.monotonic()
        modules[0].time.sleep(3)
        assert time.monotonic() - began < 2
        assert modules[1].time.monotonic() >= began
        assert pull.__kwdefaults__ == {**before, "initial_backoff": 0.1}
    finally:
        pull.__kwdefaults__.update(before)
        for module in modules:
            module.time = time  # type: ignore[attr-defined]


def test_the_control_api_is_where_it_is_expected() -> None:
    superlink = SuperLink("localhost:1", b"")
    for name in ("ListNodes", "RegisterNode", "UnregisterNode", "ListRuns"):
        assert hasattr(control_pb2, f"{name}Request")
        assert callable(getattr(import_module("flwr.supercore.control").ControlHttpClient, name))
    with pytest.raises(ControlError, match="The SuperLink at localhost:1 does not do ListNodes"):
        superlink.nodes()


def test_a_bundle_is_that_of_flower_and_its_app_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    quickstart = build_bundle(Path(__file__).parents[2] / "examples" / "quickstart")
    assert quickstart.names[:2] == ("corymb/quickstart", "1.0.0")
    assert quickstart.names[2] == hashlib.sha256(quickstart.content).hexdigest()
    assert build_bundle(Path(__file__).parents[2] / "examples" / "quickstart") == quickstart
    assert callable(load_app(quickstart))
