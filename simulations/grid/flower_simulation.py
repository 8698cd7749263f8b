"""A run in Flower's own simulation: `flwr run` on a SuperLink of its own, with Ray under it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from threading import current_thread, main_thread
from types import FrameType

import tomli_w

from corymb.server import RoundRecord
from corymb.server.journal import committed

START_SECONDS = 60.0


def require_ray() -> None:
    """Raise `ValueError` where Ray is missing."""
    if find_spec("ray") is None:
        raise ValueError("engine = 'ray' needs Flower's simulation; install it with: pip install 'flwr[simulation]'.")


@dataclass(frozen=True)
class FlowerRun:
    """A run for Flower's simulation: where its components are, its run config, and what its nodes take of Ray."""

    server_app: str  # "module:name"
    client_app: str
    config: Mapping[str, str | int]
    nodes: int
    cpus: int
    gpus: float


def simulate(run: FlowerRun, folder: Path, rounds: int, on_round: Callable[[RoundRecord], None] | None = None) -> None:
    """Run it for so many `rounds`; its server keeps a journal in `folder`.

    The environment's RAY_ADDRESS names a cluster to join; without it Ray starts on this machine.

    Raises `ValueError` with the end of Flower's log when it ends before its last round.
    """
    require_ray()
    with tempfile.TemporaryDirectory(prefix="corymb-") as name:
        home = Path(name)
        (home / "app").mkdir()
        _write_app(home / "app", run)
        resources = (
            f"num-supernodes={run.nodes} client-resources-num-cpus={run.cpus} client-resources-num-gpus={run.gpus}"
        )
        with _ends_on_signals(), _superlink(home) as environment, (home / "run.log").open("wb") as log:
            command = [_command("flwr"), "run", str(home / "app"), "--stream", "--federation-config", resources]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            reached = _follow(process, folder, on_round)
        if reached < rounds:
            tail = "\n".join((home / "run.log").read_text(errors="replace").splitlines()[-30:])
            raise ValueError(
                f"Flower's simulation ended after round {reached} of {rounds}; the end of its log:\n{tail}"
            )


def _follow(process: subprocess.Popen[bytes], folder: Path, on_round: Callable[[RoundRecord], None] | None) -> int:
    """Call `on_round` for the rounds that come into the journal, until the process ends; the last of them."""
    reached = 0
    ended = False
    while not ended:
        ended = process.poll() is not None  # asked first, so that the last rounds are not missed
        for record in committed(folder, reached):
            reached = record.round
            if on_round is not None:
                on_round(record)
        if not ended:
            time.sleep(1)
    return reached


def _write_app(place: Path, run: FlowerRun) -> None:
    app = {
        "project": {"name": "experiment", "version": "1.0.0", "requires-python": ">=3.11", "dependencies": []},
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "corymb",
                    "components": {"serverapp": run.server_app, "clientapp": run.client_app},
                    "config": dict(run.config),
                }
            }
        },
    }
    (place / "pyproject.toml").write_text(tomli_w.dumps(app))


@contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink that nobody else uses; the environment in which `flwr` finds it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        # Where Flower looks for its commands, and Python for a model of the user's.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [_command("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"Flower's SuperLink did not start:\n{(home / 'superlink.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield environment
    finally:
        process.terminate()  # where there is no /proc, what it has started is left to it
        end_all(home)
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _command(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else which(name)
    if found is None:
        raise ValueError(f"Flower's command {name!r} is not found; install flwr in the environment that runs corymb.")
    return found


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, so that it ends what it has started first."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if current_thread() is not main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_all(home: Path) -> None:
    """End every process with this FLWR_HOME, politely at first: Flower starts some in sessions of their own."""
    deadline = time.monotonic() + 10
    while (left := _processes_of(home)) and time.monotonic() < deadline:
        _signal(left, signal.SIGTERM)
        time.sleep(0.5)
    _signal(_processes_of(home), signal.SIGKILL)


def _processes_of(home: Path) -> list[int]:
    marker = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        with suppress(OSError):  # it has ended, or is not ours
            if entry.name.isdigit() and marker in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _signal(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
