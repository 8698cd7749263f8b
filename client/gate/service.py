"""The gate's own process at a site, which has imported Flower and forks for each task that Flower starts.

Flower's SuperNode starts `flwr-clientapp` by name. Corymb's program of that name (`corymb.client.gate.program`) hands
the task to this process. Its child runs Flower's own command, with the gate; the app runs in a third process, in a
sandbox (`corymb.client.gate.app_process`), which outlives the task.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path

from corymb.client.gate.app_pool import AppPool
from corymb.client.gate.policy import Refusal, SitePolicy
from corymb.client.gate.program import LOG, POLICY, SOCKET
from corymb.client.gate.task import run_task

REST_SECONDS = 20.0  # without a task, after which a process for the next run is started
IDLE_SECONDS = 3600.0  # without a task, after which the gate ends; the next task starts it again


def serve(folder: Path) -> None:
    """Answer tasks on the socket in `folder` until none has come for an hour."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    pool, path = AppPool(folder / LOG), folder / SOCKET
    _prepare(pool, folder)
    for name in ("flwr.supernode.cli", "flwr.supernode.runtime.run_clientapp", "httpcore", "corymb.protocol.codec"):
        import_module(name)  # here, not in each task's process
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        listener.settimeout(REST_SECONDS)
        idle = 0.0
        try:
            while idle < IDLE_SECONDS:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    idle += REST_SECONDS
                    _prepare(pool, folder)
                    continue
                idle = 0.0
                with connection:
                    _handle(connection, listener, folder, pool)
        finally:
            path.unlink(missing_ok=True)
            pool.close()


def _prepare(pool: AppPool, folder: Path) -> None:
    """Start a process for the next run. A task that comes says what is wrong, if that is not possible."""
    with suppress(Refusal, OSError):
        policy = SitePolicy.read(folder / POLICY)
        pool.prepare(policy.sandbox, policy.data)


def _handle(connection: socket.socket, listener: socket.socket, folder: Path, pool: AppPool) -> None:
    """Run the task that `connection` describes in a child, and send its exit code back."""
    connection.settimeout(10.0)
    task = json.loads(connection.makefile().readline())
    ours, theirs = socket.socketpair()
    if not (child := os.fork()):
        listener.close()
        ours.close()
        os._exit(run_task(task, folder, theirs))
    theirs.close()
    began = time.monotonic()
    with ours:
        for line in ours.makefile():
            _answer(json.loads(line), ours, pool)
    _, status = os.waitpid(child, 0)
    now, seconds = datetime.now().isoformat(timespec="seconds"), time.monotonic() - began
    print(f"{now} a task took {seconds:.1f} s and ended with {os.waitstatus_to_exitcode(status)}", flush=True)
    with suppress(OSError):  # the program may have been killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status) & 0xFF}\n".encode())


def _answer(asked: dict[str, object], control: socket.socket, pool: AppPool) -> None:
    """Answer what the child asks of the pool: the process of a run, or the end of it."""
    run = str(asked["run"])
    if asked["what"] == "forget":
        control.sendall(json.dumps({"ended": pool.forget(run, bool(asked["has_ended"]))}).encode())
        return
    try:
        pool.prepare(bool(asked["sandbox"]), [Path(path) for path in asked["data"]])  # type: ignore[attr-defined]
        process = pool.of(run)
    except (Refusal, OSError) as error:
        control.sendall(json.dumps({"error": str(error)}).encode())
        return
    socket.send_fds(control, [json.dumps({"is_new": process.is_new}).encode()], [process.connection.fileno()])
    process.is_new = False


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
