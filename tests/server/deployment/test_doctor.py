"""The doctor, against faults that were prepared: for each, one right sentence and an exit code of its own."""

from __future__ import annotations

import json
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corymb.cli import app
from corymb.client.gate.policy import approve, template
from corymb.protocol.certificates import TLS, fingerprint, issue, pem, public_key_of, read_certificate, read_key
from corymb.protocol.findings import Fault
from corymb.server.deployment.federation import FederationSettings, SiteKit, read_kit
from corymb.server.deployment.provision import Federation
from corymb.tests.e2e.processes import free_port


class Lab:
    """A federation whose server is a small HTTPS server of this process, and the kit of its site north."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.port, self.clock_offset, self.flwr = free_port(), 0.0, version("flwr")
        settings = FederationSettings(name="hearts", server="localhost", port=self.port, sites=["north", "south"])
        self.federation = Federation(settings, folder / "hearts")
        self.federation.make_keys_here(self.federation.create())
        self.kit = self.federation.site("north")
        self.data = folder / "data.csv"
        self.data.write_text("1,2\n")
        text = template(signed_tasks=True).replace("data = [] ", f'data = ["{self.data}"] ')
        (self.kit / "policy.toml").write_text(text.replace("sandbox = true", "sandbox = false"))
        approve(self.kit / "policy.toml", "0" * 64, "Study 17", date(2099, 1, 1))
        self.known = {fingerprint(public_key_of(read_certificate(self.kit / "site.crt")))}
        for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        lab = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = self.path.removeprefix("/health/") in lab.known
                self.answer(200 if is_known else 404, json.dumps({"online": True, "flwr": lab.flwr}).encode())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(401, b"")

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(int(time.time() - lab.clock_offset))

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("localhost", self.port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.federation.server / "server.crt", self.federation.server / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()

    def doctor(self) -> tuple[int, list[str]]:
        """Return the exit code and the sentences about faults."""
        result = CliRunner().invoke(app, ["doctor", str(self.kit), "--json"])
        findings = json.loads(result.stdout)
        return result.exit_code, [each["text"] for each in findings if each["code"]]


def wrong_name(lab: Lab) -> None:
    lab.monkeypatch.setattr("socket.getaddrinfo", _no_address)


def _no_address(*_: object, **__: object) -> None:
    raise OSError("Name or service not known")


def proxy(lab: Lab) -> None:
    lab.monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")


def clock_ahead(lab: Lab) -> None:
    lab.clock_offset = 60.0


def clock_behind(lab: Lab) -> None:
    lab.clock_offset = -400.0


def other_authority(lab: Lab) -> None:
    other = Federation(lab.federation.settings, lab.folder / "other")
    other.create()
    shutil.copy(other.server / "server.crt", lab.federation.server / "server.crt")
    shutil.copy(other.server / "server.key", lab.federation.server / "server.key")


def reissue(lab: Lab, hosts: list[str], days: int) -> None:
    authority, server = lab.federation.folder / "authority", lab.federation.server
    public = read_key(server / "server.key").public_key()
    key = read_key(authority / "ca.key")
    certificate = issue("x", TLS, public, read_certificate(authority / "ca.crt"), key, days, hosts)
    (server / "server.crt").write_bytes(pem(certificate))


def other_host(lab: Lab) -> None:
    reissue(lab, ["fl.example"], 10)


def expired(lab: Lab) -> None:
    reissue(lab, ["localhost"], 0)


def no_certificate(lab: Lab) -> None:
    (lab.kit / "site.crt").unlink()


def unused_certificate(lab: Lab) -> None:
    (lab.kit / "site.crt").rename(lab.kit / "north.crt")


def anothers_certificate(lab: Lab) -> None:
    shutil.copy(lab.federation.site("south") / "site.crt", lab.kit / "site.crt")


def unknown_key(lab: Lab) -> None:
    lab.known.clear()


def old_server(lab: Lab) -> None:
    lab.flwr = "1.20.0"


def full_disk(lab: Lab) -> None:
    usage = shutil.disk_usage("/")
    lab.monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))


def no_data(lab: Lab) -> None:
    lab.data.unlink()


def no_bubblewrap(lab: Lab) -> None:
    policy = lab.kit / "policy.toml"
    policy.write_text(policy.read_text().replace("sandbox = false", "sandbox = true"))
    lab.monkeypatch.setattr("corymb.client.gate.sandbox.shutil.which", lambda name: None)


def invalid_policy(lab: Lab) -> None:
    (lab.kit / "policy.toml").write_text("paus = true\n")


def paused(lab: Lab) -> None:
    policy = lab.kit / "policy.toml"
    policy.write_text(policy.read_text().replace("pause = false", "pause = true"))


def slow(lab: Lab) -> None:
    lab.monkeypatch.setattr("corymb.server.deployment.doctor.LEAST_UPLINK", 1e12)


@pytest.mark.parametrize(
    ("prepare", "fault", "sentence"),
    [
        (wrong_name, Fault.NAME, "The name localhost has no address; correct DNS, or server in kit.toml."),
        (proxy, Fault.PROXY, "HTTPS_PROXY sends Flower through http://proxy.example:3128; add localhost to NO_PROXY"),
        (clock_ahead, Fault.CLOCK, "s ahead of the server's; Flower accepts -300 to +5 s."),
        (clock_behind, Fault.CLOCK, "s behind the server's; Flower accepts -300 to +5 s."),
        (other_authority, Fault.AUTHORITY, "The server's certificate is not from this federation's authority"),
        (other_host, Fault.SERVER_NAME, "The server's certificate is not for localhost; its operator adds the name"),
        (expired, Fault.SERVER_EXPIRED, "The server's certificate has expired; its operator renews it."),
        (no_certificate, Fault.NO_CERTIFICATE, "The site has no certificate; run `corymb join"),
        (unused_certificate, Fault.NO_CERTIFICATE, "The certificate north.crt is not in use yet; `corymb join"),
        (anothers_certificate, Fault.NO_CERTIFICATE, "The site's certificate is not for its key; ask for a new one."),
        (unknown_key, Fault.NOT_ENROLLED, "The server does not know this site's key; it is not enrolled, or revoked."),
        (old_server, Fault.VERSION, "newer than the server's 1.20.0; install that one."),
        (full_disk, Fault.DISK, "has 0.0 GB free; it needs 1.1 GB."),
        (no_data, Fault.DATA, "There are no data at"),
        (no_bubblewrap, Fault.SANDBOX, "Bubblewrap is not installed; install it, or set sandbox = false"),
        (invalid_policy, Fault.POLICY, "the site's policy is invalid: paus is not a known key"),
        (paused, Fault.POLICY, "The site has paused: pause = true in"),
        (slow, Fault.UPLINK, "The uplink sends"),
    ],
)  # fmt: skip
def test_a_fault_has_one_sentence_and_its_exit_code(
    prepare: Callable[[Lab], None], fault: Fault, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path, monkeypatch)
    prepare(lab)
    if prepare is wrong_name:
        code, sentences = lab.doctor()
    else:
        with lab.running():
            code, sentences = lab.doctor()
    assert (code, len(sentences)) == (fault, 1), sentences
    assert sentence in sentences[0]


def test_a_server_that_is_down_and_one_that_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path, monkeypatch)
    code, (sentence,) = lab.doctor()
    assert (code, "does not answer" in sentence) == (Fault.CONNECTION, True)
    with lab.running():
        assert lab.doctor() == (0, [])
        text = CliRunner().invoke(app, ["doctor", str(lab.kit)]).stdout
    assert "ok    1 approved: Study 17." in text


def test_the_doctor_of_a_server_that_has_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tmp_path, monkeypatch)
    kit = read_kit(lab.federation.server)
    assert not isinstance(kit, SiteKit)
    (lab.federation.server / "kit.toml").write_text(
        (lab.federation.server / "kit.toml").read_text().replace("edge = true", "edge = false")
    )
    result = CliRunner().invoke(app, ["doctor", str(lab.federation.server)])
    assert result.exit_code == Fault.SUPERLINK
    assert "FAULT The SuperLink does not answer" in result.stdout
