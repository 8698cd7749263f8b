"""The program that stands in for `flwr-clientapp` at a site: it hands the task to the gate's process.

It imports nothing beyond the standard library, because Flower starts it for every message.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

NAME, POLICY, SOCKET, LOG = "flwr-clientapp", "policy.toml", "gate.socket", "gate.log"  # in the site's folder
START_SECONDS = 120.0  # for the gate's process to import Flower


def main(folder: Path) -> int:
    """Run the task of this process's arguments through the gate in `folder`. Returns its exit code."""
    arguments = sys.argv[2:]
    if "--parent-pid" in arguments:  # that is the SuperExec's, of which the gate is no child
        place = arguments.index("--parent-pid")
        del arguments[place : place + 2]
    environment = {name: value for name, value in os.environ.items() if name.startswith("FLWR_")}
    with _connection(folder) as service:
        service.sendall(json.dumps({"arguments": arguments, "environment": environment}).encode() + b"\n")
        answer = service.makefile().readline()
    return int(answer or 1)


def _connection(folder: Path) -> socket.socket:
    """Connect to the gate's process; start it if there is none."""
    path, ends, started = str(folder / SOCKET), time.monotonic() + START_SECONDS, False
    while True:
        connection = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            connection.connect(path)
            return connection
        connection.close()
        if time.monotonic() > ends:
            raise SystemExit(f"The gate in {folder} does not answer; see {folder / LOG}.")
        if not started:
            started = True
            with (folder / LOG).open("ab") as log:
                subprocess.Popen(
                    [sys.executable, "-m", "corymb.client.gate.service", str(folder)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        time.sleep(0.1)


def write_site(folder: Path, template: str) -> Path:
    """Write the program into `folder`, and a policy from `template` if there is none. Returns the program's path."""
    folder.mkdir(parents=True, exist_ok=True)
    policy, path = folder / POLICY, folder / NAME
    if not policy.exists():
        policy.write_text(template)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "{folder.resolve()}" "$@"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
