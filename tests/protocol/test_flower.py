from __future__ import annotations

import copy
import errno
import gc
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from threading import Event, Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.proto import control_pb2
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from corymb.protocol import stored_arrays
from corymb.protocol.codec import to_arrays, to_state, to_tensor
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
from corymb.protocol.flower_programs import POLLING, STATE, look_often, retry_heartbeats, wait_for_serverapps
from corymb.protocol.flower_tasks import MODULE, build_bundle, describe_task, load_app
from corymb.protocol.message_file import from_bytes, to_pieces
from corymb.protocol.stored_arrays import CLIENT, GRID, ArrayFile, store_pulled_arrays


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


@pytest.fixture
def grid_module() -> Iterator[ModuleType]:
    module, client = import_module(GRID), import_module(CLIENT).ProtobufClient
    names, send = ("pull_objects", "push_objects", "inflate_object_from_contents"), client._send
    original = {name: module.__dict__[name] for name in names}
    store_pulled_arrays()
    yield module
    module.__dict__.update(original)
    client._send = send


def _reply(arrays: dict[str, np.ndarray]) -> Message:
    set_task_identity(run_id=7, node_id=1)
    request = Message(RecordDict(), 42, "train")
    set_message_id(request, "m-1")
    record = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    return Message(RecordDict({"arrays": record, "metrics": MetricRecord({"n": 1})}), reply_to=request)


def _pulled(module: ModuleType, reply: Message) -> dict[str, Array]:
    """Pull `reply` as Flower's grid does: its objects in any order, and then the whole."""
    objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
    names = random.Random(0).sample(sorted(objects), len(objects))
    message = module.inflate_object_from_contents(reply.object_id, module.pull_objects(names, objects.__getitem__))
    assert message.content["metrics"] == reply.content["metrics"]
    return dict(message.content["arrays"])


CHUNK_SIZE = 5 << 20
LARGE = {
    "small": np.arange(5.0),
    "one chunk": np.random.default_rng(0).standard_normal(100_000),
    "three chunks": np.random.default_rng(1).standard_normal(3 * CHUNK_SIZE // 8 - 1000),
    "a small last chunk": np.random.default_rng(2).standard_normal(CHUNK_SIZE // 8),
    "equal chunks": np.zeros(2 * CHUNK_SIZE),
    "empty": np.zeros(0),
}


def test_arrays_that_are_pulled_lie_in_files(grid_module: ModuleType) -> None:
    arrays = _pulled(grid_module, _reply(LARGE))
    assert list(arrays) == list(LARGE)
    for name, array in arrays.items():
        assert array.data == Array(LARGE[name]).data
        assert isinstance(array.data, memoryview) == (name not in ("small", "empty"))
        assert np.array_equal(array.numpy(), LARGE[name])
        assert np.array_equal(to_tensor(name, array).numpy(), LARGE[name])
        assert np.array_equal(copy.deepcopy(array).numpy(), LARGE[name])


def test_equal_records_of_a_reply_are_both_restored(grid_module: ModuleType) -> None:
    reply = _reply({"w": LARGE["one chunk"], "again": LARGE["one chunk"]})
    reply.content["other"] = ArrayRecord(dict(reply.content["arrays"].items()))
    arrays = _pulled(grid_module, reply)
    assert all(np.array_equal(array.numpy(), LARGE["one chunk"]) for array in arrays.values())


def test_arrays_stay_in_memory_if_the_folder_for_temporary_files_is_full(
    grid_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(file: int, data: memoryview, position: int) -> int:
        written.append(len(data))
        if sum(written) > 8 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, position)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", write)
    arrays = _pulled(grid_module, _reply(LARGE))
    assert all(np.array_equal(array.numpy(), LARGE[name]) for name, array in arrays.items())
    assert not isinstance(arrays["three chunks"].data, memoryview)


def test_objects_are_pushed_a_few_at_a_time(grid_module: ModuleType) -> None:
    objects = get_all_nested_objects(_reply(LARGE))
    contents, pushed = {name: each.deflate() for name, each in objects.items()}, dict[str, bytes]()
    wanted = set(sorted(objects)[::2])
    grid_module.push_objects(objects, push_object_fn=pushed.__setitem__, object_ids_to_push=wanted)
    assert pushed == {name: contents[name] for name in wanted}
    assert not objects, "Flower frees each object that it has pushed"


def test_a_response_of_the_runtime_api_is_freed_at_once(grid_module: ModuleType) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.handle_request, daemon=True).start()
    client = import_module(CLIENT).ProtobufClient(f"http://127.0.0.1:{server.server_port}")
    request = client._client.build_request("POST", f"http://127.0.0.1:{server.server_port}/", content=b"")
    gc.disable()
    try:
        response = client._send(import_module(CLIENT).ProtobufRequestContext("a", RecordDict(), request))
        assert response.content == b"hello"
        freed = weakref.ref(response)
        del response
        assert freed() is None
    finally:
        gc.enable()
        server.server_close()


@pytest.mark.parametrize(("codes", "ends"), [([500, 429, 503], False), ([401], True)])
def test_a_heartbeat_with_a_temporary_error_is_repeated(
    codes: list[int], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = import_module("flwr.supercore.heartbeat").HeartbeatSender
    monkeypatch.setattr(sender, "_heartbeat", sender._heartbeat)  # restored afterwards
    retry_heartbeats()
    request = httpx.Request("POST", "http://superlink")
    answers = [httpx.HTTPStatusError("", request=request, response=httpx.Response(code)) for code in codes]
    beaten = Event()

    def beat() -> bool:
        if answers:
            raise answers.pop(0)
        beaten.set()
        return True

    heart = sender(beat)
    heart._retry_invoker.wait_function = lambda seconds: None
    if ends:
        with pytest.raises(httpx.HTTPStatusError):
            heart._retry_invoker.invoke(heart._heartbeat)
    else:
        heart.start()
        assert beaten.wait(10)
        heart.stop()


@pytest.mark.filterwarnings("ignore:No path_separator found")  # Flower's use of alembic
@pytest.mark.parametrize(
    ("is_patient", "seconds", "goes_on"), [(False, 90, False), (True, 290, True), (True, 310, False)]
)
def test_how_long_the_superlink_waits_for_a_heartbeat_of_a_serverapp(
    is_patient: bool, seconds: float, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(STATE)
    monkeypatch.setattr(module, "HEARTBEAT_PATIENCE", module.HEARTBEAT_PATIENCE)  # restored afterwards
    if is_patient:
        wait_for_serverapps()
    factory = LinkStateFactory(str(tmp_path / "state.db"), NoOpFederationManager(), ObjectStoreFactory())
    state: Any = factory.state()
    task = state.create_task("flwr-serverapp", 1)
    assert state.claim_task(task)
    assert state.activate_task(task)
    later = module.now() + timedelta(seconds=seconds)
    monkeypatch.setattr(module, "now", lambda: later)
    assert state.acknowledge_task_heartbeat(task) == goes_on
    state._engine.dispose()


def test_a_chunk_that_an_array_names_a_million_times_is_an_error(
    grid_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    reply = _reply({"w": np.zeros(CHUNK_SIZE // 2, dtype=np.int8)})
    objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
    (name,) = [name for name, content in objects.items() if content.startswith(b"Array ")]
    head, _, body = objects[name].partition(b"\0")
    many = json.dumps(json.loads(body) | {"arraychunk_ids": [0] * 1_000_000}).encode()
    objects[name] = b" ".join([*head.split(b" ")[:2], str(len(many)).encode()]) + b"\0" + many
    with pytest.raises(ValueError, match="repeats its chunks"):
        grid_module.inflate_object_from_contents(
            reply.object_id, grid_module.pull_objects(list(objects), objects.__getitem__)
        )


def test_a_large_reply_holds_one_file_descriptor_and_nothing_twice(grid_module: ModuleType) -> None:
    layers = {f"layer{i}": np.random.default_rng(i).standard_normal(10_000) for i in range(100)}
    reply = _reply(layers | {f"again{i}": layers["layer0"] for i in range(100)})
    objects = {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}
    before = len(os.listdir("/proc/self/fd"))
    contents = grid_module.pull_objects(3 * list(objects), objects.__getitem__)
    message = grid_module.inflate_object_from_contents(reply.object_id, contents)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert contents.file._end < 1.01 * 100 * 80_000 + 4096
    assert all(np.array_equal(message.content["arrays"][name].numpy(), values) for name, values in layers.items())
    del message
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_thread_that_a_failed_pull_leaves_behind_writes_nothing() -> None:
    file = ArrayFile()
    chunk = b"ArrayChunk  100000" + bytes(1) + bytes(100_000)
    file.keep(chunk)
    file.close()
    with pytest.raises(ValueError, match="has failed"):
        file.keep(chunk)


def test_a_full_disk_leaves_a_reply_in_memory_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(stored_arrays, "MOST_IN_MEMORY", 150_000)
    file = ArrayFile()
    chunk = b"ArrayChunk  100000" + bytes(1) + bytes(100_000)
    number = file.keep(chunk).partition(b"\0")[2]
    assert file.place(number) == bytes(100_000)
    with pytest.raises(ValueError, match="no room"):
        file.keep(chunk)
