"""Real Flower processes for tests: their environment, their certificates, and an end for each of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from corymb.protocol.certificates import TLS, issue, make_authority, new_key, pem, write_key, write_site_key
from corymb.simulations.grid.flower_simulation import terminate_all

BIN = Path(sys.executable).parent


class Processes:
    """Starts commands of the environment in `folder`, each logging to a file there, and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # Flower finds its own commands there
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        (folder / "flwr").mkdir()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, *command: str, first_on_path: str = "", home: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process that stays, in a group of its own. It finds commands in `first_on_path` before others.

        `home` is its `CORYMB_HOME`, if that is another one than that of all.
        """
        path = f"{first_on_path}:{self.environment['PATH']}" if first_on_path else self.environment["PATH"]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self.environment | {"PATH": path} | ({"CORYMB_HOME": str(home)} if home else {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, *command: str, timeout: float = 240) -> str:
        """Run a command to its end; what it printed. Raises `AssertionError` with that when it fails."""
        result = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def succeeds(self, *command: str) -> bool:
        """Whether a command runs to a good end: on a busy machine a SuperLink's answer may come too late for one."""
        try:
            self.run(*command, timeout=60)
        except (AssertionError, subprocess.TimeoutExpired):
            return False
        return True

    def status(self, *superlink: str) -> str:
        """The status of the only run, as Flower puts it; "" while the SuperLink does not answer."""
        try:
            (run,) = json.loads(self.run("flwr", "list", *superlink, "--format", "json", timeout=60))["runs"]
        except (AssertionError, subprocess.TimeoutExpired, ValueError, KeyError):
            return ""
        return str(run["status"])

    def logs(self) -> str:
        """The end of every log, for a failing test's message."""
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        """Kill whatever was started, children included, and the SuperLink that `flwr run` leaves behind."""
        for process in self._started:
            _kill_group(process.pid)
            process.wait()
        terminate_all(self.folder / "flwr")


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Processes that are ended whatever happens."""
    started = Processes(folder)
    try:
        yield started
    except BaseException:
        print(started.logs())
        raise
    finally:
        started.end()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def until(condition: Any, seconds: float, what: str) -> Any:
    """Wait until `condition()` is true and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.5)
    return value


def write_certificates(folder: Path) -> None:
    """`ca.crt`, and `server.pem` with `server.key` for 127.0.0.1."""
    authority_key, server_key = new_key(), new_key()
    authority = make_authority("test", authority_key, days=1)
    hosts = ["localhost", "127.0.0.1"]
    server = issue("server", TLS, server_key.public_key(), authority, authority_key, days=1, hosts=hosts)
    (folder / "ca.crt").write_bytes(pem(authority))
    (folder / "server.pem").write_bytes(pem(server))
    write_key(folder / "server.key", server_key)


def write_site_keys(path: Path) -> None:
    """A SuperNode's key pair, `path` and `path.pub`, as ssh-keygen writes one."""
    key = new_key()
    write_site_key(path, key)
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
