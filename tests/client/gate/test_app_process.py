"""Apps in processes of their own: what they keep, how they fail, and what their sandbox forbids."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from corymb.client.gate.app_pool import AppPool
from corymb.client.gate.policy import Refusal, SitePolicy
from corymb.client.gate.program import write_site
from corymb.client.gate.sandbox import sandboxed
from corymb.client.gate.service import Task, _answer
from corymb.client.gate.task import AppFailed, _Apps
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.flower import set_message_id, set_task_identity
from corymb.protocol.flower_tasks import Bundle, build_bundle
from corymb.tests.e2e.processes import until

CODE = """
import os, socket, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
calls = 0

@app.train()
def train(message, context):
    global calls
    calls += 1
    what = message.content["config"]["what"]
    if what == "raise":
        raise KeyError("no such column")
    if what == "exit":
        raise SystemExit(3)
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "hang":
        time.sleep(600)
    kept = Path.home() / ".corymb" / "clients" / "a"
    if what == "keep":
        kept.mkdir(parents=True)
        (kept / "000001.safetensors").write_bytes(b"its memory")
    context.state["mine"] = ConfigRecord({"calls": calls})
    numbers = {"num-examples": 1, "calls": calls, "can-read": int(os.path.exists(str(context.node_config["data"])))}
    numbers["sees-secret"] = int(os.path.exists(str(context.node_config["secret"])))
    numbers["kept"] = len(list(kept.glob("*")))
    numbers["processes"] = len(list(Path("/proc").glob("[0-9]*")))
    numbers["interfaces"] = len(socket.if_nameindex())
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord(numbers)})
    return Message(content, reply_to=message)
"""
PROJECT = """
[project]
name = "small"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "corymb"
[tool.flwr.app.components]
serverapp = "small.app:app"
clientapp = "small.app:app"
[tool.flwr.app.config]
"""
HAS_SANDBOX = shutil.which("bwrap") is not None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("app")
    (folder / "small").mkdir()
    (folder / "small" / "__init__.py").write_text("")
    (folder / "small" / "app.py").write_text(CODE)
    (folder / "pyproject.toml").write_text(PROJECT)
    return build_bundle(folder)


@pytest.fixture
def apps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Apps]:
    """The processes of apps as a task sees them; a thread plays the gate's own process."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    (tmp_path / "site").mkdir()
    pool, (ours, theirs) = AppPool(tmp_path / "kit", tmp_path / "log"), socket.socketpair()

    task = Task(1, ours, ours)

    def answer() -> None:
        for line in ours.makefile():
            if "forget" not in line:  # each question for a process is another task's
                pool.release(task.child)
            _answer(json.loads(line), task, pool)

    thread = threading.Thread(target=answer)
    thread.start()
    yield _Apps(theirs, tmp_path / "site")
    theirs.shutdown(socket.SHUT_RDWR)
    thread.join()
    theirs.close()
    ours.close()
    pool.close()


def ask(
    apps: _Apps,
    bundle: Bundle,
    policy: SitePolicy,
    folder: Path,
    what: str = "train",
    run: int = 7,
    **config: str,
) -> tuple[Message, Context]:
    set_task_identity(run_id=run, node_id=5)
    arrays = to_arrays({"w": torch.arange(1000.0), "half": torch.ones(2, dtype=torch.bfloat16)})
    message = Message(RecordDict({"arrays": arrays, "config": ConfigRecord({"what": what, **config})}), 5, "train")
    set_message_id(message, "m-1")
    secret = folder / "secret"
    secret.write_text("a key")
    node = {"data": str(policy.data[0]) if policy.data else "", "secret": str(secret)}
    context = Context(run, 5, node, RecordDict(), {})  # type: ignore[arg-type]
    return apps.run(policy, bundle, message, context), context


def metrics(reply: Message) -> dict[str, float]:
    record = reply.content["metrics"]
    assert isinstance(record, MetricRecord)
    return dict(record)  # type: ignore[arg-type]


def test_an_app_keeps_what_it_has_loaded_for_a_run(apps: _Apps, bundle: Bundle, tmp_path: Path) -> None:
    policy = SitePolicy(sandbox=False)
    for calls in (1, 2):
        reply, context = ask(apps, bundle, policy, tmp_path)
        assert metrics(reply)["calls"] == calls
        assert context.state["mine"] == ConfigRecord({"calls": calls})
        received = to_state(reply.content["arrays"])  # type: ignore[arg-type]
        assert torch.equal(received["w"], torch.arange(1000.0))
        assert received["half"].dtype == torch.bfloat16
        assert reply.metadata.reply_to_message_id == "m-1"
    other, _ = ask(apps, bundle, policy, tmp_path, run=8)
    assert metrics(other)["calls"] == 1  # another run, in another process


def test_an_app_that_fails_costs_its_reply_and_nothing_else(apps: _Apps, bundle: Bundle, tmp_path: Path) -> None:
    policy = SitePolicy(sandbox=False)
    with pytest.raises(AppFailed, match=r"^KeyError; its text is in gate.log of the site$"):
        ask(apps, bundle, policy, tmp_path, "raise")
    with pytest.raises(AppFailed, match="SystemExit; its text"):
        ask(apps, bundle, policy, tmp_path, "exit")
    assert metrics(ask(apps, bundle, policy, tmp_path)[0])["calls"] == 3
    with pytest.raises(AppFailed, match="the process of the app has ended with signal 9"):
        ask(apps, bundle, policy, tmp_path, "die")
    assert metrics(ask(apps, bundle, policy, tmp_path)[0])["calls"] == 1  # a new process
    with pytest.raises(AppFailed, match=r"it took longer than the 0\.5 s that the site allows"):
        ask(apps, bundle, policy.model_copy(update={"most_seconds": 0.5}), tmp_path, "hang")
    assert "KeyError: 'no such column'" in (tmp_path / "log").read_text()


@pytest.mark.skipif(not HAS_SANDBOX, reason="needs bubblewrap")
def test_what_an_app_keeps_outlives_its_process(apps: _Apps, bundle: Bundle, tmp_path: Path) -> None:
    policy = SitePolicy()

    def kept(**options: Any) -> float:
        return metrics(ask(apps, bundle, policy, tmp_path, **options)[0])["kept"]

    assert kept() == 0
    assert kept(what="keep") == 1
    with pytest.raises(AppFailed, match="the process of the app has ended"):
        ask(apps, bundle, policy, tmp_path, "die")
    assert kept() == 1  # in a new process
    assert kept(run=8) == 0  # another run has a memory of its own
    assert kept(run=9, **{"memory-run": "7"}) == 1  # unless it goes on with that one
    (copy,) = (tmp_path / "site" / "kept").iterdir()
    assert copy.name.endswith("-7.tar")
    copy.write_bytes(copy.read_bytes()[:100])  # as after a power cut
    with pytest.raises(AppFailed, match="the process of the app has ended"):
        ask(apps, bundle, policy, tmp_path, "die")
    assert kept() == 0


@pytest.mark.skipif(not HAS_SANDBOX, reason="needs bubblewrap")
def test_in_its_sandbox_an_app_sees_the_data_and_nothing_else(apps: _Apps, bundle: Bundle, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("1,2\n")
    found = metrics(ask(apps, bundle, SitePolicy(data=[data]), tmp_path)[0])
    assert (found["can-read"], found["sees-secret"]) == (1, 0)
    assert found["processes"] <= 3
    assert found["interfaces"] == 1  # loopback


@pytest.mark.skipif(not HAS_SANDBOX, reason="needs bubblewrap")
def test_the_kit_is_hidden_even_inside_the_data_and_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "site.key").write_text("a key")
    (tmp_path / "data.csv").write_text("1,2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    script = f"ls -A {kit}; ls {tmp_path}; grep CapEff /proc/self/status; ls / | grep -c '^root$'; env"
    monkeypatch.setenv("SECRET", "an access key")
    said = subprocess.run(sandboxed(["sh", "-c", script], [tmp_path], kit), capture_output=True, text=True).stdout
    assert "site.key" not in said
    assert "data.csv" in said
    assert "CapEff:\t0000000000000000" in said
    assert "an access key" not in said
    said = subprocess.run(sandboxed(["sh", "-c", script], [], kit), capture_output=True, text=True).stdout
    assert "data.csv" not in said


def test_without_bubblewrap_nothing_runs(
    apps: _Apps, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corymb.client.gate.sandbox.shutil.which", lambda name: None)
    with pytest.raises(Refusal, match="bubblewrap is not installed; install it, or set sandbox = false"):
        ask(apps, bundle, SitePolicy(), tmp_path)
    with pytest.raises(Refusal, match="bubblewrap"):
        ask(apps, bundle, SitePolicy(data=[tmp_path / "gone"]), tmp_path)


def test_a_task_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    """Flower starts a program for each task; each gets the exit code of its own, and a killed program ends its task."""
    (tmp_path / "policy.toml").write_text("sandbox = false\n")
    path = write_site(tmp_path, "")
    listener = socket.create_server(("127.0.0.1", 0))  # a SuperNode that never answers
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    service = subprocess.Popen([sys.executable, "-m", "corymb.client.gate.service", str(tmp_path)])
    try:
        until((tmp_path / "gate.socket").exists, 60, "the start of the gate")
        hanging = subprocess.Popen([path, "--insecure", "--token", "t", "--runtime-api-address", address])
        connection, _ = listener.accept()
        with connection:
            wrong = subprocess.run([path, "--no-such-option"], timeout=60)
            assert wrong.returncode == 2  # that of Flower's command for a wrong option
            assert hanging.poll() is None
            before = children(service.pid)
            hanging.kill()
            hanging.wait()
            until(lambda: len(children(service.pid)) < len(before), 10, "the end of the hanging task")
    finally:
        service.terminate()
        service.wait()
        listener.close()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
