"""A run in Flower's own simulation: `flwr run` on a SuperLink of its own, with Ray under it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import tomli_w

from corymb.server import Journal, RoundRecord
from corymb.simulations.experiment import Experiment
from corymb.simulations.scenario import scenario_of

PARTS = "corymb.simulations.flower.parts"
START_SECONDS = 60.0


def require_ray() -> None:
    """Raise `ValueError` where Ray is missing."""
    if find_spec("ray") is None:
        raise ValueError("engine = 'ray' needs Flower's simulation; install it with: pip install 'flwr[simulation]'.")


def simulate(
    experiment: Experiment,
    rule: int,
    seed: int,
    folder: Path,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> None:
    """Run the experiment's rule number `rule`; the journal in `folder` is its record.

    The environment's RAY_ADDRESS names a cluster to join; without it Ray starts on this machine.

    Raises `ValueError` with the end of Flower's log when it ends before its last round.
    """
    require_ray()
    with tempfile.TemporaryDirectory(prefix="corymb-") as name:
        home = Path(name)
        (home / "app").mkdir()
        (home / "experiment.json").write_text(experiment.model_dump_json())
        _write_app(
            home / "app",
            experiment=str(home / "experiment.json"),
            rule=rule,
            seed=seed,
            folder=str(Path.cwd()),
            journal=str(folder.resolve()),
        )
        resources = (
            f"num-supernodes={len(scenario_of(experiment, seed).names)} "
            f"client-resources-num-cpus={experiment.ray.cpus} client-resources-num-gpus={experiment.ray.gpus}"
        )
        with _superlink(home) as environment, (home / "run.log").open("wb") as log:
            command = [_command("flwr"), "run", str(home / "app"), "--stream", "--federation-config", resources]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                told = _tell(process, folder, on_round)
            finally:
                _end(process)
        if told < experiment.rounds:
            tail = "\n".join((home / "run.log").read_text(errors="replace").splitlines()[-30:])
            raise ValueError(
                f"Flower's simulation ended after round {told} of {experiment.rounds}; the end of its log:\n{tail}"
            )


def _tell(process: subprocess.Popen[bytes], folder: Path, on_round: Callable[[RoundRecord], None] | None) -> int:
    """Call `on_round` for the rounds that come into the journal, until the process ends; how many came."""
    told = 0
    ended = False
    while not ended:
        ended = process.poll() is not None  # looked at first, so that the last rounds are not missed
        if (folder / "journal.sqlite").exists():
            journal = Journal(folder, durable=False)
            for record in list(journal.rounds(after=told)):
                told = record.round
                if on_round is not None:
                    on_round(record)
            journal.close()
        if not ended:
            time.sleep(1)
    return told


def _write_app(place: Path, **config: str | int) -> None:
    app = {
        "project": {"name": "experiment", "version": "1.0.0", "requires-python": ">=3.11", "dependencies": []},
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "corymb",
                    "components": {"serverapp": f"{PARTS}:server", "clientapp": f"{PARTS}:client"},
                    "config": config,
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
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
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
        _end(process)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _command(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, politely at first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
