"""The processes of a server and of a site: Flower's own, nginx, and Corymb's programs that Flower starts by name."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from corymb.server.deployment.edge import nginx_program, write_edge
from corymb.server.deployment.federation import ServerKit, SiteKit
from corymb.server.deployment.logs import JSON_LOGS
from corymb.server.deployment.status import SITES
from corymb.server.supervisor_program import write_program

VAR = "var"  # in a kit: what its processes write
Node = Mapping[str, bool | int | float | str]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Process:
    """A process to be kept running: its name, its command, and what it has in its environment beyond ours.

    It is signalled to reload if one of the files `reloads_after` changes.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    reloads_after: tuple[Path, ...] = ()


def server_processes(folder: Path, kit: ServerKit) -> list[Process]:
    """Return the processes of the server whose kit lies in `folder`. Writes what they need into the kit."""
    var, address = _prepared(folder), f"127.0.0.1:{kit.superlink_port}"
    programs = write_program(var / "programs").parent
    (var / SITES).unlink(missing_ok=True)  # what the monitor saw the last time
    (var / "flwr").mkdir(exist_ok=True)
    (var / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{kit.federation}"\n[superlink.{kit.federation}]\n'
        f"address = {json.dumps(address)}\nroot-certificates = {json.dumps(str(folder / 'ca.crt'))}\n"
    )
    superlink = [
        sys.executable, "-m", "corymb.protocol.flower_programs", "superlink",
        "--ssl-ca-certfile", str(folder / "ca.crt"),
        "--ssl-certfile", str(folder / "superlink.crt"), "--ssl-keyfile", str(folder / "superlink.key"),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation", "process",
        "--superexec-auth-secret-file", str(var / "secret"), "--database", str(var / "state.db"),
        "--host", "127.0.0.1", "--port", str(kit.superlink_port),
    ]  # fmt: skip
    superexec = [
        _bin("flower-superexec"), "--root-certificates", str(folder / "ca.crt"), "--runtime-api-address", address,
        "--superexec-auth-secret-file", str(var / "secret"),
    ]  # fmt: skip
    ours = {"CORYMB_KIT": str(folder), "CORYMB_HOME": str(var / "corymb"), "FLWR_HOME": str(var / "flwr")}
    if kit.json_logs:
        ours[JSON_LOGS] = "1"
    processes = [
        Process("superlink", superlink, QUIET | ours),
        Process("superexec", superexec, QUIET | ours | _path(programs)),
        *_pages(folder, kit, QUIET | ours),
        Process("monitor", [sys.executable, "-m", "corymb.server.deployment.monitor", str(folder)], QUIET | ours),
    ]
    if kit.edge:
        nginx = nginx_program()
        if nginx is None:
            raise ValueError(
                "nginx is not installed, which lets sites reach Flower's fleet API only; install it. For a trial in a "
                f"network that you trust, set edge = false in {folder / 'kit.toml'}."
            )
        configuration = write_edge(folder, kit)
        command = [nginx, "-e", "stderr", "-c", str(configuration), "-g", "daemon off;"]
        processes.append(Process("edge", command, reloads_after=(folder / "server.crt",)))
    else:
        superlink[superlink.index("127.0.0.1")] = "0.0.0.0"
    return processes


def _pages(folder: Path, kit: ServerKit, environment: dict[str, str]) -> list[Process]:
    """Return the process of the metrics and of the operator's page, if the kit has a port for them."""
    command = [sys.executable, "-m", "corymb.pages.program", str(folder), "--port", str(kit.pages_port)]
    return [Process("pages", command, environment)] if kit.pages_port else []


def site_processes(folder: Path, kit: SiteKit, gate: Path, node: Node) -> list[Process]:
    """Return the processes of the site whose kit lies in `folder`.

    `gate` is the folder of its `flwr-clientapp`, and `node` Flower's node config.
    """
    var, address = _prepared(folder), f"127.0.0.1:{kit.local_port}"
    supernode = [
        sys.executable, "-m", "corymb.protocol.flower_programs", "supernode", "--superlink", f"{kit.server}:{kit.port}",
        "--root-certificates", str(folder / "ca.crt"),
        "--auth-supernode-private-key", str(folder / "site.key"), "--isolation", "process",
        "--superexec-auth-secret-file", str(var / "secret"),
        "--node-config", " ".join(f"{name}={_toml(value)}" for name, value in node.items()),
        "--host", "127.0.0.1", "--port", str(kit.local_port),
    ]  # fmt: skip
    superexec = [
        _bin("flower-superexec"), "--insecure", "--runtime-api-address", address,
        "--superexec-auth-secret-file", str(var / "secret"),
    ]  # fmt: skip
    ours = {"CORYMB_HOME": str(var / "corymb"), "FLWR_HOME": str(var / "flwr")}
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"]))
    local = {"NO_PROXY": no_proxy, "no_proxy": no_proxy, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
    return [
        Process("gate", [sys.executable, "-m", "corymb.client.gate.service", str(folder)], QUIET | ours | local),
        Process("supernode", supernode, QUIET | ours),
        Process("superexec", superexec, QUIET | ours | local | _path(gate)),
    ]


def _prepared(folder: Path) -> Path:
    """Make the folder in which processes write, and the secret of the SuperExec, if there is none. Returns it."""
    var = folder / VAR
    (var / "log").mkdir(parents=True, exist_ok=True)
    var.chmod(0o700)
    secret = var / "secret"
    if not secret.exists():
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_urlsafe(48))
    return var


def _bin(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _path(first: Path) -> dict[str, str]:
    return {"PATH": f"{first}:{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/bin:/bin')}"}


def _toml(value: bool | int | float | str) -> str:
    return json.dumps(value)
