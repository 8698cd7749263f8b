"""The watchdog of a site: it restarts a SuperNode that lives, but is offline in the server's view.

Flower's SuperNode stops sending heartbeats for ever after some errors of a proxy, and goes on to live.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from corymb.protocol.certificates import fingerprint, public_key_of, read_certificate
from corymb.server.deployment.federation import SiteKit

POLL_SECONDS = 5.0
LEAST_OFFLINE = 4.0  # seconds for which the server must see a site offline
START_SECONDS = 60.0  # that a SuperNode has to connect; twice as many after each restart


def server_view(folder: Path, kit: SiteKit) -> bool | None:
    """Return whether the server sees this site online; None if it does not say."""
    key = fingerprint(public_key_of(read_certificate(folder / "site.crt")))
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    connection = HTTPSConnection(kit.server, kit.port, timeout=5, context=context)
    try:
        connection.request("GET", f"/health/{key}")
        answer = connection.getresponse()
        return bool(json.loads(answer.read())["online"]) if answer.status == 200 else None
    except (OSError, HTTPException, ValueError, KeyError):
        return None
    finally:
        connection.close()


@dataclass
class Watchdog:
    """Decides when a SuperNode is restarted: when the server sees the site offline, in two looks in a row.

    The server sees that a minute after the last heartbeat, when it also admits the site again.
    """

    view: Callable[[], bool | None]
    now: Callable[[], float] = time.monotonic
    offline_since: float | None = None
    next_look: float = 0.0
    start_seconds: float = START_SECONDS

    def must_restart(self, seconds_running: float) -> bool:
        """Return whether the SuperNode, which has been running for `seconds_running`, is to be restarted."""
        if self.now() < self.next_look:
            return False
        self.next_look = self.now() + POLL_SECONDS
        online = self.view()
        if online is None:  # the server or the network is away; a restart would not help
            return False
        if online:
            self.offline_since, self.start_seconds = None, START_SECONDS
            return False
        if self.offline_since is None:
            self.offline_since = self.now()
        is_stuck = self.now() - self.offline_since > LEAST_OFFLINE and seconds_running > self.start_seconds
        if is_stuck:  # on a busy machine, a start may take longer
            self.offline_since, self.start_seconds = None, 2 * self.start_seconds
        return is_stuck
