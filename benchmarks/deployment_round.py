"""How long is a round in a deployment, with Flower's own programs and with `corymb serve` and `corymb join`?

Both run the same unmodified Flower apps on three SuperNodes with TLS and node keys, on this machine: an app that does
nothing, and one whose clients read 50 MB and train a torch model. A round is one training and one evaluation. Each
process has one thread, because the three sites share this machine's cores.

    python benchmarks/deployment_round.py [--rounds 4]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np

from corymb.client.gate.policy import approve, template
from corymb.protocol.certificates import public_key_of, read_certificate
from corymb.protocol.flower_control import ControlError, SuperLink, key_bytes
from corymb.protocol.flower_tasks import build_bundle
from corymb.server.deployment.federation import FederationSettings
from corymb.server.deployment.provision import Federation
from corymb.tests.e2e.processes import Processes, free_port, processes, until

APPS = {"nothing": ("trivial_app", 0.5), "50 MB, torch": ("data_app", 1 / 3)}  # with the bars
SITES = ("north", "south", "east")
HERE = Path(__file__).parent
LATEST = date(2099, 1, 1)


def provisioned(folder: Path) -> Federation:
    """Return a federation on this machine, with data of 50 MB at each site, where both apps are approved."""
    port = free_port()
    settings = FederationSettings(name="hearts", server="localhost", port=port, sites=list(SITES))
    federation = Federation(settings, folder / "hearts")
    federation.make_keys_here(federation.create())
    for number, name in enumerate(SITES):
        data = folder / f"{name}.npy"
        np.save(data, np.random.default_rng(number).normal(size=(15_944, 784)).astype(np.float32))
        kit = federation.site(name)
        (kit / "policy.toml").write_text(template(signed_tasks=True).replace("data = [] ", f'data = ["{data}"] '))
        for app, _ in APPS.values():
            approve(kit / "policy.toml", build_bundle(HERE / app).names[-1], "benchmark", LATEST)
        text = (kit / "kit.toml").read_text().replace("local_port = 9094", f"local_port = {free_port()}")
        (kit / "kit.toml").write_text(text)
    kit_file = federation.server / "kit.toml"
    kit_file.write_text(kit_file.read_text().replace(f"superlink_port = {port + 1}", f"superlink_port = {free_port()}"))
    return federation


@contextmanager
def stock(started: Processes, federation: Federation) -> Iterator[str]:
    """Flower's own programs, as its documentation starts them. Yields the name of the connection."""
    port, kit = free_port(), federation.server
    tls = ["--ssl-ca-certfile", kit / "ca.crt", "--ssl-certfile", kit / "superlink.crt"]
    tls += ["--ssl-keyfile", kit / "superlink.key", "--enable-supernode-auth"]
    database = ["--database", federation.folder / "stock.db", "--disable-runtime-dependency-installation"]
    started.start("superlink", "flower-superlink", *map(str, [*tls, *database]), "--port", str(port))
    (started.folder / "flwr" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{kit / "ca.crt"}"\n'
    )
    superlink = SuperLink(f"127.0.0.1:{port}", (kit / "ca.crt").read_bytes())
    until(lambda: answers(superlink), 120, "the start of the SuperLink")
    for name in SITES:
        key = public_key_of(read_certificate(kit / "roster" / f"{name}.crt"))
        superlink.register(key_bytes(key), name)
        started.start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates", str(kit / "ca.crt"),
            "--auth-supernode-private-key", str(federation.site(name) / "site.key"),
            "--node-config", f'data="{federation.folder.parent / name}.npy"', "--port", str(free_port()),
        )  # fmt: skip
    until(lambda: online(superlink) == len(SITES), 180, "all sites online")
    yield "here"


@contextmanager
def corymb(started: Processes, federation: Federation) -> Iterator[str]:
    """`corymb serve` and `corymb join`. Yields the name of the connection."""
    started.environment["FLWR_HOME"] = str(federation.server / "var" / "flwr")
    started.start("serve", "corymb", "serve", str(federation.server))
    for name in SITES:
        started.start(f"join-{name}", "corymb", "join", str(federation.site(name)))
    sites = federation.server / "var" / "sites.json"

    def all_online() -> bool:
        return sites.exists() and all(site["online"] for site in json.loads(sites.read_text())["sites"].values())

    until(all_online, 180, "all sites online")
    yield federation.settings.name


def answers(superlink: SuperLink) -> bool:
    try:
        superlink.nodes()
    except ControlError:
        return False
    return True


def online(superlink: SuperLink) -> int:
    return sum(node.status == "online" for node in superlink.nodes())


def seconds_per_round(started: Processes, connection: str, app: str, rounds: int) -> list[float]:
    """Run an app and return the seconds of each round."""
    out = started.folder / f"{app}.json"
    out.unlink(missing_ok=True)
    config = f'rounds={rounds} nodes={len(SITES)} out="{out}"'
    started.run("flwr", "run", str(HERE / app), connection, "-c", config)
    until(out.exists, 120 * rounds, f"the end of {app}")
    until(out.read_text, 5, "the times")
    found: list[float] = json.loads(out.read_text())
    return found


def tasks(federation: Federation) -> list[list[float]]:
    """Return for each site the seconds of its tasks so far, trainings and evaluations in turn, from the gates' logs."""
    logs = [(federation.site(name) / "var" / "log" / "gate.log").read_text() for name in SITES]
    return [[float(each) for each in re.findall(r"a task took ([\d.]+) s", log)] for log in logs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    times: dict[tuple[str, str], float] = {}
    for name, deployment in (("Flower", stock), ("Corymb", corymb)):
        with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as started:
            started.environment["OMP_NUM_THREADS"] = "1"
            federation = provisioned(Path(folder))
            with deployment(started, federation) as connection:
                for title, (app, _) in APPS.items():
                    seconds = seconds_per_round(started, connection, app, options.rounds)
                    times[name, title] = median(seconds)
                    print(f"{name}, {title}: {', '.join(f'{each:.1f}' for each in seconds)} s", flush=True)
                    if deployment is corymb:
                        last = [of_site[-2 * options.rounds :] for of_site in tasks(federation)]
                        slowest = [max(at_sites) for at_sites in zip(*last, strict=True)]
                        trained, evaluated = median(slowest[::2]), median(slowest[1::2])
                        print(
                            f"  of a round, the slowest site trains for {trained:.1f} s and evaluates for "
                            f"{evaluated:.1f} s, gate included; Flower takes the other "
                            f"{times[name, title] - trained - evaluated:.1f} s"
                        )
    missed = False
    for title, (_, bar) in APPS.items():
        ratio = times["Corymb", title] / times["Flower", title]
        missed |= ratio > bar
        print(
            f"{title}: {times['Flower', title]:.1f} s with Flower's programs, {times['Corymb', title]:.1f} s with "
            f"Corymb's, {ratio:.2f} of it (bar {bar:.2f})"
        )
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
