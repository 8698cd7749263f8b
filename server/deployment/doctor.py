"""The checks of a kit and of its surroundings: names, clocks, certificates, space, and what answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from importlib.metadata import version
from pathlib import Path

from corymb.protocol.certificates import (
    WARN_DAYS,
    days_left,
    fingerprint,
    name_of,
    public_key_of,
    read_certificate,
    read_key,
)
from corymb.protocol.findings import Fault, Finding, good
from corymb.protocol.flower_control import ControlError
from corymb.server.deployment.edge import nginx_program, write_edge
from corymb.server.deployment.empty_round import run_empty_round
from corymb.server.deployment.federation import ServerKit, SiteKit
from corymb.server.deployment.run import superlink_of
from corymb.server.deployment.status import status

EARLIEST, LATEST = -300.0, 5.0  # seconds by which a site's clock may be off, as Flower's SuperLink accepts it
LEAST_FREE = 1 << 30  # bytes, for three models of 100 MB and the SuperLink's copies
LEAST_UPLINK = 200_000  # bytes per second: below it, Flower gives up on its pieces of 5 MB
PROBE = 2_000_000  # bytes that are sent to measure the uplink
STALE_SECONDS = 60.0


def site_findings(folder: Path, kit: SiteKit) -> Iterator[Finding]:
    """Yield what is found on the way from a site to its server. A check that needs an earlier one is left out."""
    yield _disk(folder)
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    exempt = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",")
    if proxy and kit.server not in [entry.strip() for entry in exempt]:
        yield Finding(
            Fault.PROXY,
            f"HTTPS_PROXY sends Flower through {proxy}; add {kit.server} to NO_PROXY, or unset it.",
        )
    own = _own_certificate(folder, kit)
    yield own
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(kit.server, kit.port, type=socket.SOCK_STREAM)}
    except OSError:
        yield Finding(Fault.NAME, f"The name {kit.server} has no address; correct DNS, or server in kit.toml.")
        return
    yield good(f"{kit.server} is {', '.join(sorted(map(str, addresses)))}.")
    try:
        socket.create_connection((kit.server, kit.port), timeout=10).close()
    except OSError as error:
        yield Finding(
            Fault.CONNECTION,
            f"{kit.server}:{kit.port} does not answer ({error}); does it run, and is the port open?",
        )
        return
    yield from _answers(folder, kit, is_enrolled=own.fault is Fault.NONE)


def _own_certificate(folder: Path, kit: SiteKit) -> Finding:
    if not (folder / "site.crt").exists() and (folder / f"{kit.name}.crt").exists():
        text = f"The certificate {kit.name}.crt is not in use yet; `corymb join {folder}` takes it into use."
        return Finding(Fault.NO_CERTIFICATE, text)
    if not (folder / "site.crt").exists():
        return Finding(
            Fault.NO_CERTIFICATE, f"The site has no certificate; run `corymb join {folder}`, and send what it writes."
        )
    certificate = read_certificate(folder / "site.crt")
    if fingerprint(read_key(folder / "site.key").public_key()) != fingerprint(public_key_of(certificate)):
        return Finding(Fault.NO_CERTIFICATE, "The site's certificate is not for its key; ask for a new one.")
    if (left := days_left(certificate)) < 0:
        return Finding(
            Fault.SITE_EXPIRED, f"The site's certificate has expired {-left:.0f} days ago; ask for a new one."
        )
    return good(f"The certificate of {name_of(certificate)} is valid for {left:.0f} days.")


def _answers(folder: Path, kit: SiteKit, is_enrolled: bool) -> Iterator[Finding]:
    """Yield what is found in the server's answers."""
    key = fingerprint(public_key_of(read_certificate(folder / "site.crt"))) if is_enrolled else "0"
    try:
        state, date, body = _get(folder, kit, f"/health/{key}")
    except ssl.SSLCertVerificationError as error:
        yield _tls(kit, error)
        return
    except (OSError, HTTPException) as error:
        yield Finding(Fault.CONNECTION, f"{kit.server}:{kit.port} does not speak TLS as it should: {error}.")
        return
    yield good("The server's certificate is good.")
    offset = time.time() - date.timestamp()
    if not EARLIEST <= offset <= LATEST:
        way = "ahead of" if offset > 0 else "behind"
        yield Finding(
            Fault.CLOCK,
            f"This clock is {abs(offset):.0f} s {way} the server's; Flower accepts -300 to +5 s.",
        )
    else:
        yield good(f"The clock is {offset:+.0f} s off the server's.")
    if is_enrolled and state != 200:
        yield Finding(Fault.NOT_ENROLLED, "The server does not know this site's key; it is not enrolled, or revoked.")
        return
    if is_enrolled:
        yield from _versions(json.loads(body))
    yield _uplink(folder, kit)


def _tls(kit: SiteKit, error: ssl.SSLCertVerificationError) -> Finding:
    if "expired" in error.verify_message:
        return Finding(Fault.SERVER_EXPIRED, "The server's certificate has expired; its operator renews it.")
    if "match" in error.verify_message or "mismatch" in error.verify_message:
        return Finding(
            Fault.SERVER_NAME,
            f"The server's certificate is not for {kit.server}; its operator adds the name to other_names and renews.",
        )
    return Finding(
        Fault.AUTHORITY, f"The server's certificate is not from this federation's authority ({error.verify_message})."
    )


def _versions(health: dict[str, object]) -> Iterator[Finding]:
    theirs, ours = str(health.get("flwr", "")), version("flwr")
    if theirs and _minor(theirs) < _minor(ours):
        yield Finding(
            Fault.VERSION,
            f"This site has Flower {ours}, newer than the server's {theirs}; install that one.",
        )
    else:
        yield good(f"Flower {ours} here, {theirs} at the server.")


def _minor(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in number.split(".")[:2])


def _uplink(folder: Path, kit: SiteKit) -> Finding:
    began = time.monotonic()
    try:
        _get(folder, kit, "/v1/fleet/push-object", bytes(PROBE))
    except (OSError, HTTPException) as error:
        return Finding(Fault.UPLINK, f"{PROBE / 1e6:.0f} MB cannot be sent to the server: {error}.")
    rate = PROBE / (time.monotonic() - began)
    if rate < LEAST_UPLINK:
        return Finding(
            Fault.UPLINK,
            f"The uplink sends {rate / 1e3:.0f} kB/s; Flower needs {LEAST_UPLINK / 1e3:.0f} kB/s.",
        )
    return good(f"The uplink sends {rate / 1e6:.1f} MB/s.")


def _get(folder: Path, kit: SiteKit, path: str, body: bytes | None = None) -> tuple[int, datetime, bytes]:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    connection = HTTPSConnection(kit.server, kit.port, timeout=60, context=context)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        answer = connection.getresponse()
        date = parsedate_to_datetime(answer.getheader("Date") or "")
        return answer.status, date if date.tzinfo else date.replace(tzinfo=UTC), answer.read()
    finally:
        connection.close()


def server_findings(folder: Path, kit: ServerKit) -> Iterator[Finding]:
    """Yield what is found on the machine of a server."""
    yield _disk(folder)
    left = days_left(read_certificate(folder / "server.crt"))
    if left < 0:
        text = f"The server's certificate has expired {-left:.0f} days ago; run `corymb provision ... renew`."
        yield Finding(Fault.SERVER_EXPIRED, text)
    else:
        yield good(f"The server's certificate is valid for {left:.0f} days{'; renew it' if left < WARN_DAYS else ''}.")
    if kit.edge:
        yield _nginx(folder, kit)
    try:
        superlink_of(folder, kit).nodes()
        runs = superlink_of(folder, kit).run_statuses()
    except ControlError:
        yield Finding(Fault.SUPERLINK, f"The SuperLink does not answer; see {folder / 'var/log/superlink.log'}.")
        return
    yield good("The SuperLink answers.")
    try:
        state = status(folder)
    except ValueError as error:
        yield Finding(Fault.MONITOR, str(error))
        return
    age = (datetime.now(UTC) - datetime.fromisoformat(state["server"]["seen_at"])).total_seconds()
    if age > STALE_SECONDS:
        yield Finding(Fault.MONITOR, f"The monitor has not looked for {age:.0f} s; see var/log/monitor.log.")
        return
    is_busy = any(not each.startswith("finished") for each in runs.values())
    online = [name for name, site in state["sites"].items() if site["online"]]
    answered = _empty_round(folder, kit, online) if online and not is_busy else None
    offline = [name for name, site in status(folder)["sites"].items() if not site["online"]]  # after that round
    if offline:
        yield Finding(Fault.OFFLINE, f"Offline: {', '.join(offline)}; run `corymb doctor` there.")
    else:
        yield good(f"All {len(state['sites'])} sites are online.")
    if online and is_busy:
        yield good("A run is under way, whose rounds say which sites answer; no empty round is run.")
    if answered is not None:
        yield answered


def _empty_round(folder: Path, kit: ServerKit, online: list[str]) -> Finding:
    try:
        answers = run_empty_round(folder, kit)
    except ValueError as error:
        return Finding(Fault.EMPTY_ROUND, f"An empty round cannot be run. {error}")
    if answers is None:
        return Finding(Fault.EMPTY_ROUND, f"The ServerApp of an empty round fails; see {folder / 'var/log'}.")
    if silent := [name for name in online if name not in answers]:
        return Finding(Fault.EMPTY_ROUND, f"No answer to an empty round: {', '.join(silent)}; see gate.log there.")
    if wrong := [f"{name} ({error})" for name, error in answers.items() if error]:
        return Finding(Fault.EMPTY_ROUND, f"The answer to an empty round is an error: {', '.join(wrong)}.")
    return good(f"{len(answers)} sites have answered a signed empty round.")


def _nginx(folder: Path, kit: ServerKit) -> Finding:
    nginx = nginx_program()
    if nginx is None:
        return Finding(Fault.NGINX, "nginx is not installed; install it.")
    (folder / "var" / "log").mkdir(parents=True, exist_ok=True)
    command = [nginx, "-t", "-e", "stderr", "-c", str(write_edge(folder, kit))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return Finding(Fault.NGINX, f"nginx does not accept its configuration: {' '.join(done.stderr.split())[-300:]}")
    return good("nginx accepts its configuration.")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        return Finding(Fault.DISK, f"{folder} has {free / 1e9:.1f} GB free; it needs {LEAST_FREE / 1e9:.1f} GB.")
    return good(f"{free / 1e9:.0f} GB are free.")
