"""Three hospitals and a server, each in a network namespace of its own, set up with the commands of docs/operate.md."""

from __future__ import annotations

import json
import os
import random
import shutil
import ssl
import subprocess
import sys
import time
from http.client import HTTPSConnection
from pathlib import Path

from corymb.tests.e2e.processes import BIN, Processes, until

APP = Path(__file__).parents[2] / "examples" / "hospitals"
SERVER, SITES = "server", ("cleveland", "budapest", "long-beach")
FILES = ("processed.cleveland.data", "processed.hungarian.data", "processed.va.data")  # of UCI
PORT, NETWORK = 8443, "10.77.0"
ADDRESS = {name: f"{NETWORK}.{number}" for number, name in enumerate((SERVER, *SITES), start=1)}
BRIDGE, HOST = "corymb0", f"{NETWORK}.254"
IS_POSSIBLE = os.getuid() == 0 and all(shutil.which(name) for name in ("ip", "nft", "nginx", "bwrap"))
WHY_NOT = "needs root, iproute2, nftables, nginx and bubblewrap"


class Hospitals:
    """The federation `hearts`. Data are UCI's files in $CORYMB_HEART_DISEASE, else drawn in the same format."""

    def __init__(self, started: Processes, data: Path | None = None) -> None:
        self.started, self.folder = started, started.folder
        self.federation = self.folder / "hearts"
        data = data or (Path(found) if (found := os.environ.get("CORYMB_HEART_DISEASE")) else None)
        for site, name in zip(SITES, FILES, strict=True):
            text = (data / name).read_text() if data else _drawn(site)
            (self.folder / f"{site}.data").write_text(text)
        self._make_network()

    def provision(self) -> None:
        """Write federation.toml, make the kits, and let each site make its key and get its certificate."""
        settings = f'name = "hearts"\nserver = "fl.example"\nport = {PORT}\nsites = {json.dumps(list(SITES))}\n'
        (self.folder / "hearts.toml").write_text(settings)
        self.corymb("provision", self.file)
        for site in SITES:
            kit = self.kit(site)
            assert self.exit_code("join", kit) == 3  # it has no certificate yet
            self.corymb("provision", self.file, "sign", kit / f"{site}.csr")
            shutil.copy(self.federation / f"{site}.crt", kit / f"{site}.crt")
            self.edit_policy(site, "data = [] ", f'data = ["{self.folder / site}.data"] ')

    @property
    def file(self) -> Path:
        """The file of the federation."""
        return self.folder / "hearts.toml"

    def kit(self, name: str) -> Path:
        """Return the kit of the server or of a site."""
        return self.federation / SERVER if name == SERVER else self.federation / "sites" / name

    def start(self, *names: str, programs: Path = BIN) -> list[subprocess.Popen[bytes]]:
        """Start the server or sites, with the `programs` of an environment."""
        return [
            self.started.start(
                name, *self.within(name), str(programs / "corymb"), "serve" if name == SERVER else "join",
                str(self.kit(name)),
            )
            for name in names
        ]  # fmt: skip

    def within(self, name: str) -> list[str]:
        """Return the beginning of a command that runs in a namespace."""
        return [shutil.which("ip") or "ip", "netns", "exec", f"corymb-{name}"]

    def corymb(self, *arguments: object, timeout: float = 240) -> str:
        """Run a command of Corymb on the machine of the server, and return what it prints."""
        return self.started.run(*self.within(SERVER), str(BIN / "corymb"), *map(str, arguments), timeout=timeout)

    def exit_code(self, *arguments: object) -> int:
        """Run a command of Corymb that may fail."""
        command = [*self.within(SERVER), str(BIN / "corymb"), *map(str, arguments)]
        return subprocess.run(command, env=self.started.environment, capture_output=True, timeout=240).returncode

    def online(self) -> set[str]:
        """Return the sites that the server sees online."""
        try:
            state = json.loads(self.corymb("status", self.kit(SERVER), "--json"))
        except AssertionError:  # it has not started
            return set()
        return {name for name, site in state["sites"].items() if site["online"]}

    def wait_for_all(self, seconds: float = 300) -> float:
        """Wait until all sites are online. Returns after how many seconds."""
        began = time.monotonic()
        until(lambda: self.online() == set(SITES), seconds, "all sites online")
        return time.monotonic() - began

    def run(self, app: Path = APP, *changes: str) -> subprocess.Popen[bytes]:
        """Start an app; the process ends with the run. What it prints goes to run.log."""
        options = [part for change in changes for part in ("--set", change)]
        command = ["run", str(app), "--federation", str(self.kit(SERVER)), *options]
        return self.started.start("run", *self.within(SERVER), str(BIN / "corymb"), *command)

    def said(self) -> str:
        """Return what the run has printed so far."""
        return (self.folder / "run.log").read_text()

    def journal(self) -> Path:
        """Return the folder of the newest journal."""
        runs = self.kit(SERVER) / "var" / "corymb" / "runs"
        return max(runs.iterdir(), key=lambda path: path.stat().st_mtime)

    def approve(self, app: Path, *sites: str) -> None:
        """Approve an app at sites."""
        digest = self.app_hash(app)
        for site in sites:
            purpose = ["--purpose", "a test", "--until", "2099-01-01", "--app", digest]
            self.corymb("approve", self.kit(site), *purpose)

    def app_hash(self, app: Path) -> str:
        """Return the SHA-256 of an app's bundle, as the sites see it."""
        return self.corymb("hash", app).split()[0]

    def page(self, path: str) -> tuple[int, str]:
        """Return the status and the body of a page on the machine of the server; 0 if it does not answer."""
        code = (
            "import sys, urllib.request, urllib.error\n"
            "try: answer = urllib.request.urlopen(sys.argv[1], timeout=20)\n"
            "except urllib.error.HTTPError as error: answer = error\n"
            "print(answer.status, answer.read().decode())"
        )
        command = [*self.within(SERVER), sys.executable, "-c", code, f"http://127.0.0.1:{PORT + 2}{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        status, _, body = done.stdout.partition(" ")
        return int(status or 0), body

    def fetch(self, method: str, path: str, body_mib: int = 0) -> int:
        """Send a request to the server's port, as a stranger would. Returns the HTTP status; 0 if there is none."""
        context = ssl.create_default_context(cafile=str(self.federation / "authority" / "ca.crt"))
        context.check_hostname = False
        connection = HTTPSConnection(ADDRESS[SERVER], PORT, timeout=30, context=context)
        try:
            connection.putrequest(method, path)
            connection.putheader("Content-Length", str(body_mib << 20))
            connection.endheaders()
            for _ in range(min(body_mib, 80)):
                try:
                    connection.send(bytes(1 << 20))
                except OSError:  # it has answered, and closed
                    break
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def server_certificate(self) -> str:
        """Return the certificate with which the server's port answers, as PEM."""
        return ssl.get_server_certificate((ADDRESS[SERVER], PORT))

    def memory_mib(self) -> float:
        """Return the memory of nginx and the SuperLink."""
        total = 0.0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                command = (status.parent / "cmdline").read_bytes()
                if str(self.kit(SERVER)).encode() in command or command.startswith(b"nginx"):
                    total += int(status.read_text().partition("VmRSS:")[2].split()[0]) / 1024
            except (OSError, IndexError, ValueError):
                continue
        return total

    def edit_policy(self, site: str, before: str, after: str) -> None:
        """Change a site's policy."""
        path = self.kit(site) / "policy.toml"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    def nft(self, name: str, *rules: str) -> None:
        """Replace the packet rules of a namespace."""
        chain = f"chain input {{ type filter hook input priority 0; {''.join(f'{rule}; ' for rule in rules)}}}\n"
        script = f"table inet corymb\ndelete table inet corymb\ntable inet corymb {{ {chain if rules else ''} }}"
        subprocess.run([*self.within(name), "nft", "-f", "-"], input=script, text=True, check=True)

    def link(self, name: str, state: str) -> None:
        """Take the link of a namespace up or down."""
        _ip("netns", "exec", f"corymb-{name}", "ip", "link", "set", "eth0", state)

    def set_server_of(self, site: str, address: str) -> None:
        """Let a site find the server at another address."""
        (Path("/etc/netns") / f"corymb-{site}" / "hosts").write_text(f"127.0.0.1 localhost\n{address} fl.example\n")

    def end(self) -> None:
        """End all processes and remove the network."""
        self.started.end()
        for number in range(1, len(ADDRESS) + 1):
            subprocess.run(["ip", "link", "del", f"corymb{number}"], capture_output=True)
        for name in (SERVER, *SITES):
            subprocess.run(["ip", "netns", "del", f"corymb-{name}"], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / f"corymb-{name}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)

    def _make_network(self) -> None:
        self.end()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{HOST}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number, name in enumerate((SERVER, *SITES)):
            space, outer = f"corymb-{name}", f"corymb{number + 1}"
            (Path("/etc/netns") / space).mkdir(parents=True, exist_ok=True)
            self.set_server_of(name, ADDRESS[SERVER])
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{ADDRESS[name]}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _drawn(site: str) -> str:
    """Return 120 patients in the format of UCI's files, whose diagnosis depends on age, pulse and angina."""
    generator = random.Random(site)
    rows = []
    for _ in range(120):
        age, pulse, angina = generator.gauss(53, 9), generator.gauss(138, 25), generator.random() < 0.4
        risk = (age - 53) / 9 - (pulse - 138) / 25 + 2 * angina - 0.8 + generator.gauss(0, 0.5)
        cells = [round(age), generator.randint(0, 1), generator.randint(1, 4), 130, 230, 0, generator.randint(0, 2)]
        rows.append([*cells, round(pulse), int(angina), round(generator.random() * 2, 1), "?", "?", "?", int(risk > 0)])
    return "\n".join(",".join(map(str, row)) for row in rows) + "\n"
