"""A federation of real Flower processes on this machine: a SuperLink, three SuperNodes, and the app `one_hot`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from corymb.client.gate.policy import template
from corymb.client.gate.program import write_site
from corymb.server.supervisor_program import write_program
from corymb.tests.e2e.processes import Processes, free_port, until
from corymb.tests.e2e.proxy import Proxy

APP = str(Path(__file__).parent / "one_hot")
SITES = 3
GATE_POLICY = template(signed_tasks=False).replace("sandbox = true", "sandbox = false")  # the app writes a log


class Federation:
    """A SuperLink that survives a crash, a SuperExec with Corymb's supervisor, and the sites; `run` starts the app.

    The journals lie in the folder `journals`, the SuperLink's database in `database`, and what the sites keep in
    neither. `start_seconds` is how long the last start of the SuperLink took. With `through_proxy`, a proxy is
    in between. With `served`, SuperLink and SuperNodes are as `corymb serve` and `join` run them. With `gates`, each
    site has Corymb's gate, and a policy that approves nothing.
    """

    def __init__(
        self,
        started: Processes,
        journals: Path | None = None,
        database: Path | None = None,
        through_proxy: bool = False,
        gates: bool = False,
        served: bool = False,
    ) -> None:
        self.started, self.folder = started, started.folder
        self.journals, self.database = journals or self.folder, database or self.folder
        self.port = free_port()
        self.has_gates, self.is_served = gates, served
        self.proxy = Proxy(self.port) if through_proxy else None
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        (self.folder / "secret").write_text("a secret of the SuperExec alone, for tests only")
        program = write_program(self.folder / "programs")
        started.environment["PATH"] = f"{program.parent}:{started.environment['PATH']}"
        started.environment["CORYMB_HOME"] = str(self.journals / "corymb")
        self.superlink = self.start_superlink()
        started.start(
            "superexec", "flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{self.port}",
            "--superexec-auth-secret-file", str(self.folder / "secret"),
        )  # fmt: skip
        self.sites = [self.start_site(site) for site in range(SITES)]

    def start_superlink(self) -> subprocess.Popen[bytes]:
        """Start the SuperLink, with its state on disk, and wait until it answers."""
        superlink = self.started.start(
            "superlink", *self.program("superlink"), "--insecure", "--isolation", "process",
            "--superexec-auth-secret-file", str(self.folder / "secret"),
            "--database", str(self.database / "state.db"), "--host", "127.0.0.1", "--port", str(self.port),
        )  # fmt: skip
        started = time.monotonic()
        until(lambda: self.started.succeeds("flwr", "list", "here"), 120, "the start of the SuperLink")
        self.start_seconds = time.monotonic() - started
        return superlink

    def start_site(self, site: int) -> subprocess.Popen[bytes]:
        """Start the SuperNode of a site."""
        port = self.proxy.port if self.proxy else self.port
        return self.started.start(
            f"site-{site}", *self.program("supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}",
            "--node-config", f'partition-id={site} num-partitions={SITES} folder="{self.folder}"',
            "--host", "127.0.0.1", "--port", str(free_port()),
            home=self.folder / "sites",
            first_on_path=str(write_site(self.site_folder(site), GATE_POLICY).parent) if self.has_gates else "",
        )  # fmt: skip

    def program(self, name: str) -> list[str]:
        """The beginning of the command that starts Flower's program of this name."""
        return ["python", "-m", "corymb.protocol.flower_programs", name] if self.is_served else [f"flower-{name}"]

    def site_folder(self, site: int) -> Path:
        """The folder of a site's policy and ledger."""
        return self.folder / f"gate-{site}"

    def run(self, config: str = "") -> subprocess.Popen[bytes]:
        """Start the app; the returned process ends with the run."""
        self._run = self.started.start("run", "flwr", "run", APP, "here", "--stream", "-c", config)
        return self._run

    def ended(self) -> bool:
        """Whether the run has ended."""
        return self._run.poll() is not None

    def child(self) -> int | None:
        """The process in which the ServerApp runs."""
        home = f"CORYMB_HOME={self.journals / 'corymb'}".encode()
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
        return load_file(max(self.journal().glob("model-*.safetensors")))["counts"]

    def journal(self) -> Path:
        """The folder of the only journal."""
        (journal,) = (self.journals / "corymb" / "runs").iterdir()
        return journal

    def run_to_its_end(self, config: str = "", seconds: float = 900) -> str:
        """Run the app to its end and return the status of the run, as Flower puts it."""
        self.run(config)
        until(self.ended, seconds, "the end of the run")
        return self.started.status("here")

    def assert_counted(self, rounds: int) -> None:
        """Each update was counted exactly once."""
        counts = self.counts()
        expected = torch.zeros_like(counts)
        expected[:rounds] = 1
        assert torch.equal(counts, expected)

    def assert_exact(self, rounds: int) -> None:
        """Each update was counted exactly once, and each site has trained once in each round."""
        self.assert_counted(rounds)
        assert self.trained() == {site: dict.fromkeys(range(1, rounds + 1), 1) for site in range(SITES)}


def kill(pid: int) -> None:
    """Kill a process with SIGKILL."""
    os.kill(pid, signal.SIGKILL)
