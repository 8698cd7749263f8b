"""The gate's own process at a site, which has imported Flower and forks for each task that Flower starts.

Flower's SuperNode starts `flwr-clientapp` by name. Corymb's program of that name (`corymb.client.gate.program`) hands
the task to this process. Its child runs Flower's own command, with the gate; the app runs in a third process, in a
sandbox (`corymb.client.gate.app_process`), which outlives the task.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from corymb.client.gate.app_pool import AppPool
from corymb.client.gate.policy import Refusal, SitePolicy
from corymb.client.gate.program import LOG, POLICY, SOCKET
from corymb.client.gate.task import run_task
from corymb.protocol.flower_programs import look_often

LOCK = "gate.lock"  # in the site's folder
REST_SECONDS = 20.0  # without a task, after which a process for the next run is started
IDLE_SECONDS = 3600.0  # without a task, after which the gate ends; the next task starts it again


def serve(folder: Path) -> None:
    """Answer tasks on the socket in `folder` until none has come for an hour, or not at all if another process does."""
    lock = (folder / LOCK).open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    pool, path = AppPool(folder, folder / LOG), folder / SOCKET
    _prepare(pool, folder)
    for name in ("flwr.supernode.cli", "flwr.supernode.runtime.run_clientapp", "httpcore", "corymb.protocol.codec"):
        import_module(name)  # here, not in each task's process
    look_often()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        try:
            Service(folder, pool, listener).run()
        finally:
            path.unlink(missing_ok=True)
            pool.close()


def _prepare(pool: AppPool, folder: Path) -> None:
    """Start a process for the next run. A task that comes says what is wrong, if that is not possible."""
    with suppress(Refusal, OSError):
        policy = SitePolicy.read(folder / POLICY)
        pool.prepare(policy.sandbox, policy.data)


class Service:
    """The tasks under way, each in a child of this process, and their connections."""

    def __init__(self, folder: Path, pool: AppPool, listener: socket.socket) -> None:
        self._folder, self._pool, self._listener = folder, pool, listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._tasks: dict[int, Task] = {}

    def run(self) -> None:
        """Run tasks until none has come for an hour. A task that hangs holds up no other."""
        idle = 0.0
        while idle < IDLE_SECONDS or self._tasks:
            events = self._selector.select(REST_SECONDS)
            idle = 0.0 if events else idle + REST_SECONDS
            if not events and not self._tasks:
                self._pool.end_idle()
                _prepare(self._pool, self._folder)
            for key, _ in events:
                if key.fileobj is self._listener:
                    self._begin()
                    continue
                task = self._tasks.get(key.data)
                if task is not None:
                    self._attend(task, is_program=key.fileobj is task.program)

    def _begin(self) -> None:
        """Fork a child for the task that the next connection describes."""
        program, _ = self._listener.accept()
        program.settimeout(10.0)
        try:
            description = json.loads(program.makefile().readline())
        except (OSError, ValueError):
            program.close()
            return
        ours, theirs = socket.socketpair()
        if not (child := os.fork()):
            code = 1
            try:
                self._listener.close()
                ours.close()
                code = run_task(description, self._folder, theirs)
            except BaseException:
                traceback.print_exc()
            finally:  # nothing else of this process may run here
                os._exit(code)
        theirs.close()
        self._tasks[child] = Task(child, program, ours)
        for each in (program, ours):
            self._selector.register(each, selectors.EVENT_READ, child)

    def _attend(self, task: Task, is_program: bool) -> None:
        """Answer a question of a task's child, or end the task if its child or its program has ended."""
        data = b"" if is_program else task.control.recv(65536)
        if data:
            for line in data.splitlines():
                _answer(json.loads(line), task, self._pool)
            return
        if is_program:  # Flower has ended the program
            os.kill(task.child, signal.SIGKILL)
        _, status = os.waitpid(task.child, 0)
        code = os.waitstatus_to_exitcode(status)
        now, seconds = datetime.now().isoformat(timespec="seconds"), time.monotonic() - task.began
        print(f"{now} a task took {seconds:.1f} s and ended with {code}", flush=True)
        with suppress(OSError):
            task.program.sendall(f"{code & 0xFF}\n".encode())
        for each in (task.program, task.control):
            self._selector.unregister(each)
            each.close()
        del self._tasks[task.child]
        if code < 0:  # its app may still be at work
            self._pool.forget(task.child)
        self._pool.release(task.child)


@dataclass
class Task:
    """A task: its `child`, the connection to the `program` that Flower has started, and that to the child."""

    child: int
    program: socket.socket
    control: socket.socket
    began: float = field(default_factory=time.monotonic)


def _answer(asked: dict[str, Any], task: Task, pool: AppPool) -> None:
    """Answer what the child of a task asks of the pool: a process for its app, or the end of it."""
    if asked["what"] == "forget":
        task.control.sendall(json.dumps({"ended": pool.forget(task.child, asked["has_ended"])}).encode())
        return
    try:
        pool.prepare(asked["sandbox"], [Path(path) for path in asked["data"]])
        process, is_new = pool.of(asked["run"], task.child)
    except (Refusal, OSError) as error:
        task.control.sendall(json.dumps({"error": str(error)}).encode())
        return
    socket.send_fds(task.control, [json.dumps({"is_new": is_new}).encode()], [process.connection.fileno()])


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
