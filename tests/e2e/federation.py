"""A federation of real Flower processes on this machine: a SuperLink, three SuperNodes, and the app `one_hot`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from corymb.server.supervisor import write_program
from corymb.tests.e2e.processes import Processes, free_port, until

APP = str(Path(__file__).parent / "one_hot")
SITES = 3


class Federation:
    """Starts a SuperLink with Corymb's supervisor of ServerApps, and the sites; `run` starts the app."""

    def __init__(self, started: Processes, fleet_port: int | None = None) -> None:
        self.started, self.folder = started, started.folder
        self.port = free_port()
        self.fleet_port = fleet_port or self.port  # that of a proxy, if there is one
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        program = write_program(self.folder / "programs")
        started.environment["PATH"] = f"{program.parent}:{started.environment['PATH']}"
        started.environment["CORYMB_HOME"] = str(self.folder / "corymb")
        self.superlink = self.start_superlink()
        self.sites = [self.start_site(site) for site in range(SITES)]

    def start_superlink(self) -> subprocess.Popen[bytes]:
        superlink = self.started.start(
            "superlink", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
            "--database", str(self.folder / "state.db"), "--host", "127.0.0.1", "--port", str(self.port),
        )  # fmt: skip
        until(lambda: self.started.succeeds("flwr", "list", "here"), 120, "the start of the SuperLink")
        return superlink

    def start_site(self, site: int) -> subprocess.Popen[bytes]:
        return self.started.start(
            f"site-{site}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.fleet_port}",
            "--node-config", f'partition-id={site} num-partitions={SITES} folder="{self.folder}"',
            "--host", "127.0.0.1", "--port", str(free_port()),
        )  # fmt: skip

    def run(self, config: str = "") -> subprocess.Popen[bytes]:
        """Start the app; the returned process ends with the run."""
        self._run = self.started.start("run", "flwr", "run", APP, "here", "--stream", "-c", config)
        return self._run

    def ended(self) -> bool:
        """Whether the run has ended."""
        return self._run.poll() is not None

    def child(self) -> int | None:
        """The process in which the ServerApp runs."""
        home = f"CORYMB_HOME={self.folder / 'corymb'}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes()
                if b"--child" in line and home in (process / "environ").read_bytes():
                    return int(process.name)
            except OSError:
                continue
        return None

    def trained(self) -> dict[int, Counter[int]]:
        """How often each site has trained in each round."""
        logs = {site: self.folder / f"trained-{site}.log" for site in range(SITES)}
        text = {site: path.read_text() if path.exists() else "" for site, path in logs.items()}
        return {site: Counter(map(int, lines.split())) for site, lines in text.items()}

    def counts(self) -> torch.Tensor:
        """The final model: how often the update of each site was counted in each round."""
        (journal,) = (self.folder / "corymb" / "runs").iterdir()
        newest = max(journal.glob("model-*.safetensors"))
        return load_file(newest)["counts"]


def kill(pid: int) -> None:
    """Kill a process with SIGKILL."""
    os.kill(pid, signal.SIGKILL)
