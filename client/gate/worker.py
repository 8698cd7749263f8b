"""The warm process of a site: it has imported torch and Flower, and forks for each task that Flower starts.

Flower's SuperNode starts `flwr-clientapp` by name. Corymb's program of that name (`corymb.client.gate.program`) hands
the task to this process, which runs Flower's own command in a child, with the gate around the app.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from corymb.client.gate.gate import Gate
from corymb.client.gate.program import SOCKET
from corymb.protocol.flower_tasks import run_clientapp_command

IDLE_SECONDS = 3600.0  # without a task, after which the process ends


def serve(folder: Path) -> None:
    """Answer tasks on the socket in `folder` until none has come for an hour."""
    _warm_up()
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        listener.settimeout(IDLE_SECONDS)
        with suppress(TimeoutError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    _handle(connection, listener, folder)
    path.unlink(missing_ok=True)


def _handle(connection: socket.socket, listener: socket.socket, folder: Path) -> None:
    """Run the task that `connection` describes in a child, and send its exit code back."""
    connection.settimeout(10.0)
    task = json.loads(connection.makefile().readline())
    if not (child := os.fork()):
        listener.close()
        os._exit(_run(task, folder))
    _, status = os.waitpid(child, 0)
    with suppress(OSError):  # the program may have been killed
        connection.sendall(f"{os.waitstatus_to_exitcode(status) & 0xFF}\n".encode())


def _run(task: dict[str, object], folder: Path) -> int:
    """Run Flower's command in this process, which was forked for it. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    environment, arguments = task["environment"], task["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.update(environment)
    sys.argv = ["flwr-clientapp", *arguments]
    gate = Gate(folder)
    try:
        run_clientapp_command(gate.admit, gate.around, gate.release)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _warm_up() -> None:
    """Import what every task needs, past the first step of an optimiser, whose imports take seconds."""
    import torch

    import_module("corymb.client")
    torch.set_num_threads(1)  # a fork must not inherit threads
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter], lr=0.1).step()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
