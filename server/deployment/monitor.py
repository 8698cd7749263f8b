"""The server's own view of its sites: it registers the keys of the roster, and publishes who is online.

Each site may read its own state at `/health/FINGERPRINT`, where the fingerprint is that of its key. The files that
`corymb status` reads lie in the kit's `var/sites.json`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from corymb.protocol.certificates import WARN_DAYS, days_left, fingerprint, public_key_of, read_certificate
from corymb.protocol.flower_control import ControlError, NodeState, SuperLink, key_bytes
from corymb.server.deployment.edge import HEALTH
from corymb.server.deployment.federation import ServerKit, read_kit
from corymb.server.deployment.logs import set_up
from corymb.server.deployment.provision import ROSTER
from corymb.server.deployment.status import SITES

log = logging.getLogger("corymb")
POLL_SECONDS = 5.0


class Monitor:
    """The monitor of the server whose kit lies in `folder`."""

    def __init__(self, folder: Path, superlink: SuperLink) -> None:
        self._folder, self._superlink = folder, superlink
        self._online: dict[str, bool] = {}
        self._active: tuple[str, set[str]] = "", set()  # since when which runs are under way
        self._warned: set[str] = set()
        self._refused: set[str] = set()

    def look(self) -> None:
        """Make the SuperLink's nodes those of the roster, and write down who is online. Raises `ControlError`."""
        roster = {path.stem: read_certificate(path) for path in (self._folder / ROSTER).glob("*.crt")}
        keys = {name: key_bytes(public_key_of(certificate)) for name, certificate in roster.items()}
        nodes = [node for node in self._superlink.nodes() if node.status != "unregistered"]
        known = {node.public_key: node for node in nodes}
        for node in nodes:
            if keys.get(node.name) != node.public_key:
                self._superlink.unregister(node.node_id)
                log.info("Unregistered a key of %s, which is not on the roster.", node.name or "an unnamed node")
        for name, key in keys.items():
            if key not in known:
                self._register(name, key)
        states = {name: known.get(key) for name, key in keys.items()}
        runs = {str(run_id): state for run_id, state in self._superlink.run_statuses().items()}
        self._publish({name: fingerprint(public_key_of(roster[name])) for name in roster}, states, runs)
        for name, certificate in roster.items():
            left = days_left(certificate)
            if left < WARN_DAYS and name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "The certificate of %s is valid for %.0f more days; renew it.", name, left, extra={"site": name}
                )

    def _register(self, name: str, key: bytes) -> None:
        try:
            self._superlink.register(key, name)
            log.info("Registered the key of the site %s.", name, extra={"site": name})
        except ControlError as error:  # such as a key that was unregistered before; other sites must not suffer
            if name not in self._refused:
                log.error("The SuperLink does not take the key of %s, which needs a new one: %s", name, error)
            self._refused.add(name)

    def _publish(self, fingerprints: dict[str, str], states: dict[str, NodeState | None], runs: dict[str, str]) -> None:
        health = self._folder / "var" / HEALTH
        health.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        sites: dict[str, Any] = {}
        for name, state in states.items():
            online = state is not None and state.status == "online"
            if self._online.get(name) != online:
                log.info("The site %s is %s.", name, "online" if online else "offline", extra={"site": name})
            self._online[name] = online
            since = state and (state.last_activated_at if online else state.last_deactivated_at)
            sites[name] = {"online": online, "since": since or "", "node": str(state.node_id) if state else ""}
            _write(health / fingerprints[name], {"online": online, "at": now, "flwr": version("flwr")})
        active = {run_id for run_id, state in runs.items() if not state.startswith("finished")}
        if active != self._active[1]:
            self._active = now, active
        _write(self._folder / "var" / SITES, {"at": now, "sites": sites, "runs": runs, "runs_since": self._active[0]})
        for path in health.iterdir():
            if path.name not in fingerprints.values():
                path.unlink()


def _write(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content))
    draft.replace(path)


def main(folder: Path) -> None:
    """Look every few seconds, for ever."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    set_up()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    kit = read_kit(folder)
    assert isinstance(kit, ServerKit)
    monitor = Monitor(folder, SuperLink(f"127.0.0.1:{kit.superlink_port}", (folder / "ca.crt").read_bytes()))
    fails = 0
    while True:
        try:
            monitor.look()
            fails = 0
        except ControlError as error:
            fails += 1
            if fails == 3:
                log.error("%s", error)
        except (OSError, ValueError) as error:
            log.error("The kit %s is damaged: %s", folder, error)
        time.sleep(POLL_SECONDS if fails == 0 else 1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
