"""Run an app in Flower's own simulation: `flwr run` on a private SuperLink, with Ray as the backend."""

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

START_SECONDS = 60.0  # timeout for the SuperLink to listen


def require_ray() -> None:
    """Raise `ValueError` if Ray is not installed."""
    if find_spec("ray") is None:
        raise ValueError("engine = 'ray' needs Flower's simulation; run pip install 'flwr[simulation]'.")


@dataclass(frozen=True)
class FlowerRun:
    """A run in Flower's simulation.

    `server_app` and `client_app` are "module:name", `config` is the run config, and `cpus` and `gpus` are what Ray
    reserves for each running node.
    """

    server_app: str
    client_app: str
    config: Mapping[str, str | int]
    nodes: int
    cpus: int
    gpus: float


def simulate(run: FlowerRun, folder: Path, rounds: int, on_round: Callable[[RoundRecord], None] | None = None) -> None:
    """Run `run` for `rounds` rounds, and call `on_round` for each; its server writes a journal to `folder`.

    If the environment variable RAY_ADDRESS is set, the run joins that Ray cluster; else Ray starts on this machine.

    Raises `ValueError` with the end of Flower's log if the run ends before its last round.
    """
    require_ray()
    with tempfile.TemporaryDirectory(prefix="corymb-") as name:
        home = Path(name)
        (home / "app").mkdir()
        _write_app(home / "app", run)
        resources = (
            f"num-supernodes={run.nodes} client-resources-num-cpus={run.cpus} client-resources-num-gpus={run.gpus}"
        )
        with _exit_on_signals(), _superlink(home) as environment, (home / "run.log").open("wb") as log:
            command = [_command("flwr"), "run", str(home / "app"), "--stream", "--federation-config", resources]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            last_round = _follow(process, folder, on_round)
        if last_round < rounds:
            tail = "\n".join((home / "run.log").read_text(errors="replace").splitlines()[-30:])
            raise ValueError(
                f"Flower's simulation ended after round {last_round} of {rounds}. The end of its log:\n{tail}"
            )


def _follow(process: subprocess.Popen[bytes], folder: Path, on_round: Callable[[RoundRecord], None] | None) -> int:
    """Call `on_round` for each round committed to the journal until the process ends; return the last round."""
    last_round = 0
    ended = False
    while not ended:
        ended = process.poll() is not None  # polled before reading, so that the last rounds are read
        for record in committed(folder, last_round):
            last_round = record.round
            if on_round is not None:
                on_round(record)
        if not ended:
            time.sleep(1)
    return last_round


def _write_app(folder: Path, run: FlowerRun) -> None:
    """Write the pyproject.toml of a Flower app that has the components and config of `run`."""
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
    (folder / "pyproject.toml").write_text(tomli_w.dumps(app))


@contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """Run a private SuperLink on a free port; yield the environment in which `flwr` finds it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        # Flower finds its commands on PATH, and Python finds the user's modules on PYTHONPATH.
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
        process.terminate()  # without /proc, the SuperLink has to end its own children
        terminate_all(home)
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _command(name: str) -> str:
    """Return the path of Flower's command `name`: beside this Python, else on PATH."""
    beside_python = Path(sys.executable).parent / name
    path = str(beside_python) if beside_python.exists() else which(name)
    if path is None:
        raise ValueError(f"Flower's command {name!r} was not found; install flwr in the environment that runs corymb.")
    return path


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit`, so that this process first ends the processes that it started."""

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


def terminate_all(home: Path) -> None:
    """Send SIGTERM, then SIGKILL, to every process with this FLWR_HOME; Flower starts some in their own sessions."""
    deadline = time.monotonic() + 10
    while (running := _processes_of(home)) and time.monotonic() < deadline:
        _signal(running, signal.SIGTERM)
        time.sleep(0.5)
    _signal(_processes_of(home), signal.SIGKILL)


def _processes_of(home: Path) -> list[int]:
    """Return the ids of all processes with this FLWR_HOME in their environment; empty without /proc."""
    marker = f"FLWR_HOME={home}".encode()
    processes = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        with suppress(OSError):  # the process has ended, or belongs to another user
            if entry.name.isdigit() and marker in (entry / "environ").read_bytes().split(b"\0"):
                processes.append(int(entry.name))
    return processes


def _signal(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
