"""A site's key and certificate, and its processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from corymb.protocol.certificates import (
    SITE,
    check_issued,
    fingerprint,
    make_request,
    new_key,
    public_key_of,
    read_certificate,
    read_key,
    write_site_key,
)
from corymb.server.deployment.federation import SiteKit
from corymb.server.deployment.processes import Node, site_processes
from corymb.server.deployment.supervision import Supervisor
from corymb.server.deployment.watch import Watchdog, server_view

COPY_SECONDS = 2.0  # that a certificate may take to be copied
KEY, NEXT_KEY, CERTIFICATE = "site.key", "site.key.next", "site.crt"


def write_request(folder: Path, kit: SiteKit, is_new_key: bool = False) -> Path:
    """Make the site's key, if there is none, and a request for its certificate. Returns the request's path.

    With `is_new_key`, make a new key, which takes effect once its certificate lies in the kit.
    """
    path = folder / (NEXT_KEY if is_new_key else KEY)
    if is_new_key:
        path.unlink(missing_ok=True)
    if not path.exists():
        write_site_key(path, new_key())
    request = folder / f"{kit.name}.csr"
    request.write_bytes(make_request(kit.name, read_key(path)))
    return request


def adopt_certificate(folder: Path, kit: SiteKit) -> str:
    """Take a certificate that came back, `NAME.crt`, into use, with its key. Returns what has changed, "" if nothing.

    Raises `ValueError` if the certificate is for another key or comes from another authority.
    """
    path = folder / f"{kit.name}.crt"
    if not path.exists():
        return ""
    certificate = read_certificate(path)
    try:
        check_issued(certificate, read_certificate(folder / "ca.crt"), SITE)
    except ValueError as error:
        raise ValueError(f"{path} is not used: {error}.") from None
    for name in (KEY, NEXT_KEY):
        key = folder / name
        if key.exists() and fingerprint(read_key(key).public_key()) == fingerprint(public_key_of(certificate)):
            path.replace(folder / CERTIFICATE)
            key.replace(folder / KEY)
            return "a new key" if name == NEXT_KEY else "a new certificate"
    raise ValueError(f"{path} is not used: it is not for a key of this site.")


def join(folder: Path, kit: SiteKit, gate: Path, node: Node, say: Callable[[str], None]) -> None:
    """Run the processes of a site until SIGTERM.

    `gate` is the folder of the site's `flwr-clientapp`, and `node` Flower's node config.
    """
    watchdog = Watchdog(partial(server_view, folder, kit))

    def attend(supervisor: Supervisor) -> None:
        path = folder / f"{kit.name}.crt"
        if path.exists() and time.time() - path.stat().st_mtime < COPY_SECONDS:
            return  # it may still be copied
        try:
            changed = adopt_certificate(folder, kit)
        except ValueError as error:
            say(str(error))
            path.rename(folder / f"{kit.name}.crt.refused")
            return
        if changed:
            say(f"The site has {changed}.")
        if changed == "a new key":
            supervisor.restart("supernode", "it has a new key")
        if watchdog.must_restart(supervisor.seconds_running("supernode")):
            supervisor.restart("supernode", "the server sees this site offline")

    Supervisor(site_processes(folder, kit, gate, node), folder / "var" / "log", say, attend).run()
