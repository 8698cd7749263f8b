"""A federation of three hospitals, as docs/operate.md sets it up: real processes, TLS, nginx, networks that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from corymb.client.gate.ledger import Ledger
from corymb.tests.e2e.delaying_proxy import DelayingProxy
from corymb.tests.e2e.hospitals import ADDRESS, APP, HOST, IS_POSSIBLE, PORT, SERVER, SITES, WHY_NOT, Hospitals
from corymb.tests.e2e.processes import processes, until

OLD = Path(found) if (found := os.environ.get("CORYMB_OLD_PROGRAMS")) else None
NOSY = Path(__file__).parent / "nosy"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not IS_POSSIBLE, reason=WHY_NOT),
]


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Hospitals]:
    with processes(tmp_path) as started:
        hospitals = Hospitals(started)
        try:
            yield hospitals
        finally:
            hospitals.end()


def test_from_a_file_to_the_first_round_and_the_exported_model(hospitals: Hospitals) -> None:
    began = time.monotonic()
    hospitals.provision()
    hospitals.approve(APP, *SITES)
    provisioned = time.monotonic() - began
    hospitals.start(SERVER, *SITES)
    hospitals.wait_for_all()
    online = time.monotonic() - began
    run = hospitals.run(APP, "rounds=3")
    until(lambda: "round 1:" in hospitals.said(), 120, "the first round")
    first = time.monotonic() - began
    until(lambda: run.poll() is not None, 240, "the end of the run")
    assert run.returncode == 0, hospitals.said()
    assert hospitals.page("/ready") == (200, '{"ok":true,"problems":[]}\n')
    metrics = hospitals.page("/metrics")[1]
    assert 'corymb_replies_total{verdict="admitted"} 9.0' in metrics
    assert "corymb_sites_online 3.0" in metrics
    view = json.loads(hospitals.page("/api/view")[1])
    assert (view["sentence"], view["alarms"]) == ("Finished after round 3 of 3.", [])
    assert {event["what"] for event in view["events"]} >= {"asked", "replied"}
    assert "3 sites have answered a signed empty round." in hospitals.corymb("doctor", hospitals.kit(SERVER))
    hospitals.edit_policy(SITES[0], "metrics = [", "metricks = [")
    with pytest.raises(AssertionError, match=rf"{SITES[0]} \(Refusal: the site's policy is invalid: metricks is not a"):
        hospitals.corymb("doctor", hospitals.kit(SERVER))
    model = hospitals.folder / "model.safetensors"
    hospitals.corymb("model", "export", hospitals.journal(), "--out", model)
    with safe_open(model, "pt") as file:
        assert set(file.keys()) == {"weight", "bias"}
    for site in SITES:
        audit = hospitals.corymb("audit", hospitals.kit(site))
        assert "The ledger is whole" in audit
        assert sum(entry["event"] == "ran" for entry in Ledger(hospitals.kit(site) / "ledger.jsonl").entries()) == 6
    print(hospitals.said())
    print(f"provisioned after {provisioned:.0f} s, online after {online:.0f} s, first round after {first:.0f} s")
    assert first < 180


def test_ready_sees_that_nothing_takes_up_a_run_and_orders_reach_it(hospitals: Hospitals) -> None:
    hospitals.provision()
    hospitals.approve(APP, *SITES)
    hospitals.start(SERVER, *SITES)
    hospitals.wait_for_all()
    secret = f"--superexec-auth-secret-file {hospitals.kit(SERVER) / 'var' / 'secret'}"
    found = subprocess.run(["pgrep", "-f", f"flower-superexec.*{secret}"], capture_output=True, text=True).stdout
    superexec = [int(number) for number in found.split()]
    assert superexec
    for number in superexec:
        os.kill(number, signal.SIGSTOP)
    run = hospitals.run(APP, "rounds=50")
    until(lambda: hospitals.page("/ready")[0] == 503, 180, "the server to say that it makes no progress")
    assert "nothing happens" in hospitals.page("/ready")[1]
    assert hospitals.page("/health")[0] == 200  # all processes are there
    for number in superexec:
        os.kill(number, signal.SIGCONT)
    until(lambda: "round 1:" in hospitals.said(), 180, "the first round")
    assert hospitals.page("/ready")[0] == 200
    hospitals.corymb("order", hospitals.kit(SERVER), "stop")
    until(lambda: run.poll() is not None, 120, "the end of the run")
    assert run.returncode == 0, hospitals.said()
    assert "Stopped by" in json.loads(hospitals.page("/api/view")[1])["sentence"]


def test_an_app_runs_only_where_it_is_approved_and_cannot_leave_its_sandbox(hospitals: Hospitals) -> None:
    hospitals.provision()
    *approving, refusing = SITES
    hospitals.approve(NOSY, *approving)
    tried = ["key", "kit", "passwords", "task", "internet", "processes", "kill", "write", "data"]
    for site in approving:
        listed = ", ".join(f'"{name}"' for name in ["num-examples", *tried])
        hospitals.edit_policy(site, 'metrics = ["num-examples"', f'metrics = [{listed}, "num-examples"')
    hospitals.start(SERVER, *SITES)
    hospitals.wait_for_all()
    run = hospitals.run(NOSY, f"kit={hospitals.kit(approving[0])}")
    until(lambda: run.poll() is not None, 240, "the end of the run")
    assert run.returncode == 0, hospitals.said()
    with sqlite3.connect(hospitals.journal() / "journal.sqlite") as database:
        verdicts = database.execute("SELECT node, code, reason, metrics FROM verdicts WHERE round = 2").fetchall()
    by_site = {node: (code, reason, json.loads(metrics)) for node, code, reason, metrics in verdicts}
    code, reason, _ = by_site[refusing]
    assert (code, reason) == (
        "error",
        f"{refusing}: error 2: Refusal: the app {hospitals.app_hash(NOSY)} is not approved at this site.",
    )
    for site in approving:
        code, _, metrics = by_site[site]
        assert code == "admitted"
        assert metrics == {name: float(name == "data") for name in tried}  # it can read the data, and nothing else
        left = [entry for entry in Ledger(hospitals.kit(site) / "ledger.jsonl").entries() if entry["event"] == "left"]
        assert left[-1]["withheld"] == ["patients"]
    assert "changed" not in (hospitals.folder / f"{SITES[0]}.data").read_text()


def test_only_the_fleet_and_a_health_check_answer_from_outside(hospitals: Hospitals) -> None:
    hospitals.provision()
    hospitals.start(SERVER)
    until(lambda: hospitals.fetch("GET", "/health") == 200, 60, "the server's answer")
    until(lambda: hospitals.fetch("POST", "/v1/fleet/activate-node") not in (502, 503), 60, "the SuperLink's answer")
    paths = [
        "/",
        "/docs",
        "/openapi.json",
        "/metrics",
        "/v1",
        "/v1/fleet",
        "/v1/fleet/../control/list-runs",
        "/health/x",
    ]
    paths += [f"/v1/{api}" for api in ("control/start-run", "control/list-nodes", "control/register-node")]
    paths += ["/v1/runtime/acquire-task", "/v1/fleet/%2e%2e/control/list-nodes", "//v1/control/list-runs"]
    for method in ("GET", "POST"):
        assert {path: hospitals.fetch(method, path) for path in paths} == dict.fromkeys(paths, 404)
    assert hospitals.fetch("POST", "/v1/fleet/activate-node") in (400, 401, 403, 415, 422)  # the SuperLink's own answer
    before = hospitals.memory_mib()
    for mib in (65, 512, 4096):
        assert hospitals.fetch("POST", "/v1/fleet/push-object", body_mib=mib) == 413
    grown = hospitals.memory_mib() - before
    print(f"bodies of 65 MiB to 4 GiB are refused; memory grew by {grown:.0f} MiB")
    assert grown < 50
    with socket.socket() as stranger:  # the SuperLink itself listens on its own machine only
        assert stranger.connect_ex((ADDRESS[SERVER], PORT + 1)) != 0


def test_sites_come_back_by_themselves_after_faults_of_the_network(hospitals: Hospitals) -> None:
    hospitals.provision()
    hospitals.approve(APP, *SITES)
    hospitals.start(SERVER, *SITES)
    hospitals.wait_for_all()
    run = hospitals.run(APP, "rounds=20", "deadline=120.0")
    until(lambda: "round 2:" in hospitals.said(), 180, "the second round")

    hospitals.nft(SERVER, f"tcp dport {PORT} reject with tcp reset")  # a balancer closes all connections
    time.sleep(10)
    hospitals.nft(SERVER)
    until(lambda: hospitals.online() != set(SITES) or "round 5:" in hospitals.said(), 90, "an effect of the balancer")
    balancer = hospitals.wait_for_all()

    hospitals.link(SITES[0], "down")
    time.sleep(60)
    hospitals.link(SITES[0], "up")
    link = hospitals.wait_for_all()

    with DelayingProxy((HOST, PORT), (ADDRESS[SERVER], PORT), seconds=0.15):  # 300 ms there and back
        hospitals.set_server_of(SITES[1], HOST)
        hospitals.nft(SITES[1], "meta l4proto tcp numgen random mod 100 < 2 drop")
        hospitals.link(SITES[1], "down")  # so that it connects anew
        time.sleep(5)
        hospitals.link(SITES[1], "up")
        until(lambda: run.poll() is not None, 900, "the end of the run")
    assert run.returncode == 0, hospitals.said()
    print(hospitals.said())
    print(f"back after {balancer:.0f} s (balancer closed for 10 s), {link:.0f} s (link down for 60 s)")
    assert max(balancer, link) < 90
    with sqlite3.connect(hospitals.journal() / "journal.sqlite") as database:
        assert database.execute("SELECT COUNT(*) FROM rounds").fetchone() == (20,)


def test_a_certificate_is_renewed_and_keys_are_rotated_and_revoked_during_a_run(hospitals: Hospitals) -> None:
    hospitals.provision()
    hospitals.approve(APP, *SITES)
    hospitals.start(SERVER, *SITES)
    hospitals.wait_for_all()
    run = hospitals.run(APP, "rounds=14")
    until(lambda: "round 2:" in hospitals.said(), 180, "the second round")
    before = hospitals.server_certificate()
    hospitals.corymb("provision", hospitals.file, "renew")
    until(lambda: hospitals.server_certificate() != before, 30, "the new certificate at the server's port")

    site = SITES[0]
    hospitals.corymb("join", hospitals.kit(site), "--new-key")
    assert hospitals.exit_code("provision", hospitals.file, "sign", hospitals.kit(site) / f"{site}.csr") == 2
    hospitals.corymb("provision", hospitals.file, "rotate", hospitals.kit(site) / f"{site}.csr")
    began = time.monotonic()
    shutil.move(hospitals.federation / f"{site}.crt", hospitals.kit(site) / f"{site}.crt")
    time.sleep(5)
    hospitals.wait_for_all()
    rotated = time.monotonic() - began

    hospitals.corymb("provision", hospitals.file, "revoke", SITES[2])
    until(lambda: f"{SITES[2]}: not connected" in hospitals.said() or run.poll() is not None, 240, "two sites only")
    until(lambda: run.poll() is not None, 600, "the end of the run")
    assert run.returncode == 0, hospitals.said()
    print(hospitals.said())
    print(f"a site is back {rotated:.0f} s after its new certificate")
    assert "14: 2 of" in hospitals.said()


@pytest.mark.skipif(OLD is None, reason="CORYMB_OLD_PROGRAMS names no bin folder of an environment with Flower 1.41")
def test_the_server_is_upgraded_and_rolled_back_and_the_run_goes_on(hospitals: Hospitals) -> None:
    assert OLD is not None
    hospitals.provision()
    hospitals.approve(APP, *SITES)
    (server,) = hospitals.start(SERVER, programs=OLD)
    hospitals.start(*SITES, programs=OLD)
    hospitals.wait_for_all()
    run = hospitals.run(APP, "rounds=12")
    until(lambda: "round 2:" in hospitals.said(), 180, "the second round")

    stop(server)
    stop(run)
    archive = hospitals.folder / "before.tar.gz"
    hospitals.corymb("backup", hospitals.kit(SERVER), archive)
    began = time.monotonic()
    (server,) = hospitals.start(SERVER)
    hospitals.wait_for_all()
    upgraded = time.monotonic() - began
    run = hospitals.run(APP, "rounds=6", "resume=true")
    until(lambda: run.poll() is not None, 600, "the end of the run with the new server")
    assert run.returncode == 0, hospitals.said()
    assert "round 1:" not in hospitals.said()  # it went on after the rounds that were finished

    stop(server)
    shutil.move(hospitals.kit(SERVER), hospitals.folder / "newer")
    hospitals.corymb("restore", archive, hospitals.kit(SERVER))
    began = time.monotonic()
    hospitals.start(SERVER, programs=OLD)
    hospitals.wait_for_all()
    rolled_back = time.monotonic() - began
    run = hospitals.run(APP, "rounds=4", "resume=true")
    until(lambda: run.poll() is not None, 600, "the end of the run with the old server")
    assert run.returncode == 0, hospitals.said()
    print(f"all sites online {upgraded:.0f} s after the upgrade, {rolled_back:.0f} s after the way back")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(60)
