"""One unmodified app folder in Flower's simulation, in a deployment with TLS and node keys, and on LocalGrid."""

from __future__ import annotations

from pathlib import Path

import pytest

from corymb.server import Journal
from corymb.tests.e2e.processes import (
    Processes,
    free_port,
    processes,
    until,
    write_certificates,
    write_site_keys,
)

APP = str(Path(__file__).parent.parent.parent / "examples" / "quickstart")
SITES = 3


def assert_learnt(folder: Path, nodes: list[str] | None = None, rounds: int = 3) -> None:
    """All rounds, all sites in each, and a model that is good in the end."""
    journal = Journal(folder)
    records = list(journal.rounds())
    journal.close()
    assert [len(record.admitted) for record in records] == [SITES] * rounds
    accuracies = [record.evaluate["accuracy"] for record in records]
    assert accuracies[-1] > 0.9
    assert accuracies[-1] > accuracies[0]
    if nodes is not None:
        assert [verdict.node for verdict in records[0].verdicts] == nodes


def test_on_local_grid(tmp_path: Path) -> None:
    with processes(tmp_path) as started:
        journal = tmp_path / "journal"
        started.run("corymb", "simulate", "--app", APP, "--nodes", "3", "--set", f"journal={journal}")
        assert_learnt(journal, ["client-0", "client-1", "client-2"])


def run_to_its_end(started: Processes, *arguments: str) -> None:
    """Run `flwr run --stream`, which ends with the run. A run that ended badly fails the test."""
    run = started.start("run", "flwr", "run", APP, *arguments)
    until(lambda: run.poll() is not None, 900, "the end of the run")


@pytest.mark.timeout(1000)
def test_in_flowers_simulation(tmp_path: Path) -> None:
    with processes(tmp_path) as started:
        journal = tmp_path / "journal"
        run_to_its_end(
            started, "--stream", "-c", f'journal="{journal}"',
            "--federation-config", f"num-supernodes={SITES} client-resources-num-cpus=1",
        )  # fmt: skip
        assert started.status() == "finished:completed"
        assert_learnt(journal)


@pytest.mark.timeout(1300)
def test_in_a_deployment_with_tls_and_node_keys(tmp_path: Path) -> None:
    with processes(tmp_path) as started:
        write_certificates(tmp_path)
        port, ca, journal = free_port(), str(tmp_path / "ca.crt"), tmp_path / "journal"
        (tmp_path / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "deployment"\n'
            f'[superlink.deployment]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{ca}"\n'
        )
        started.start(
            "superlink", "flower-superlink",
            "--ssl-ca-certfile", ca,
            "--ssl-certfile", str(tmp_path / "server.pem"), "--ssl-keyfile", str(tmp_path / "server.key"),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--database", str(tmp_path / "state.db"), "--host", "127.0.0.1", "--port", str(port),
        )  # fmt: skip
        until(lambda: started.succeeds("flwr", "list", "deployment"), 120, "the start of the SuperLink")
        for site in range(SITES):
            key = tmp_path / f"site-{site}"
            write_site_keys(key)
            register = ("flwr", "supernode", "register", f"{key}.pub", "deployment", "--name", f"site-{site}")
            until(lambda register=register: started.succeeds(*register), 120, f"the registration of site-{site}")
            started.start(
                f"site-{site}", "flower-supernode",
                "--superlink", f"127.0.0.1:{port}", "--root-certificates", ca,
                "--auth-supernode-private-key", str(key),
                "--node-config", f'partition-id={site} num-partitions={SITES} name="site-{site}"',
                "--host", "127.0.0.1", "--port", str(free_port()),
            )  # fmt: skip
        run_to_its_end(started, "deployment", "--stream", "-c", f'journal="{journal}" rounds=2')
        assert started.status("deployment") == "finished:completed"
        assert_learnt(journal, [f"site-{site}" for site in range(SITES)], rounds=2)
