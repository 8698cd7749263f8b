"""Faults of the network, of sites, of the SuperLink and of the disk, in a real federation."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from corymb.tests.e2e.federation import Federation, kill
from corymb.tests.e2e.processes import Processes, processes, until
from corymb.tests.e2e.proxy import CUT

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as running:
        yield running


def stop(process: subprocess.Popen[bytes]) -> None:
    """Freeze a process and those that it has started."""
    os.killpg(process.pid, signal.SIGSTOP)


def committed(federation: Federation) -> int:
    """The number of rounds in the journal."""
    try:
        with sqlite3.connect(federation.journal() / "journal.sqlite") as database:
            return int(database.execute("SELECT COUNT(*) FROM rounds").fetchone()[0])
    except (OSError, ValueError, sqlite3.Error):
        return 0


def test_a_proxy_that_fails_each_push_in_turn_loses_nothing(started: Processes) -> None:
    federation = Federation(started, through_proxy=True)
    assert federation.proxy is not None
    rounds = 6
    federation.run(f"rounds={rounds}")
    for done, fault in enumerate((500, 429, 403, 413, CUT)):
        until(lambda done=done: committed(federation) > done, 600, f"round {done + 1}")
        federation.proxy.faults.append(fault)
    until(federation.ended, 900, "the end of the run")
    assert started.status("here") == "finished:completed"
    assert federation.proxy.injected == [500, 429, 403, 413, CUT]
    federation.assert_exact(rounds)


def test_a_slow_upload_does_not_hold_the_round_beyond_its_deadline(started: Processes) -> None:
    federation = Federation(started, through_proxy=True)
    assert federation.proxy is not None
    federation.proxy.slow_site_rate = 150_000
    status = federation.run_to_its_end("rounds=1 deadline=40.0 model.options.padding=5000000")
    assert status == "finished:completed"
    with sqlite3.connect(federation.journal() / "journal.sqlite") as database:
        asked, ended = database.execute(
            "SELECT (SELECT MIN(at) FROM events WHERE what = 'asked'), (SELECT MAX(at) FROM events)"
        ).fetchone()
        seconds = database.execute("SELECT seconds FROM rounds").fetchone()[0]
        verdicts = sorted(row[0] for row in database.execute("SELECT code FROM verdicts"))
    print(f"the round took {seconds:.1f} s; from the first request to its end {ended - asked:.1f} s")
    assert verdicts == ["admitted", "admitted", "silent"]


@pytest.mark.parametrize(("seconds", "served"), [(6, False), (30, False), (90, True)])
def test_the_superlink_is_killed_and_comes_back(started: Processes, seconds: int, served: bool) -> None:
    """It answers again after these seconds, or as soon as its start allows; that of `corymb serve` may take longer."""
    federation = Federation(started, served=served)
    rounds = 4
    federation.run(f"rounds={rounds}")
    until(lambda: committed(federation) >= 1, 300, "the first round")
    kill(federation.superlink.pid)
    time.sleep(max(0.0, seconds - federation.start_seconds))
    federation.start_superlink()
    until(lambda: started.status("here").startswith("finished"), 900, "the end of the run")
    assert started.status("here") == "finished:completed"
    federation.assert_exact(rounds)


def test_after_a_long_absence_of_the_superlink_a_new_run_finds_the_journal(started: Processes) -> None:
    federation = Federation(started)
    rounds = 4
    federation.run(f"rounds={rounds}")
    until(lambda: committed(federation) >= 2, 300, "the second round")
    kill(federation.superlink.pid)
    time.sleep(90)
    federation.start_superlink()
    until(lambda: started.status("here").startswith("finished"), 300, "the end of the first run")
    federation.run(f"rounds={rounds} resume=true")
    until(federation.ended, 900, "the end of the second run")
    federation.assert_counted(rounds)


def test_one_frozen_site_does_not_stop_the_run(started: Processes) -> None:
    federation = Federation(started)
    federation.run("rounds=3 quorum=2")
    until(lambda: committed(federation) >= 1, 300, "the first round")
    stop(federation.sites[2])
    until(federation.ended, 900, "the end of the run")
    assert started.status("here") == "finished:completed"
    assert committed(federation) == 3


def test_two_frozen_sites_of_three_end_the_run_with_an_untouched_model(started: Processes) -> None:
    federation = Federation(started)
    federation.run("rounds=20 quorum=2 max_abandoned=2 deadline=60.0 wait_seconds=120.0")
    until(lambda: committed(federation) >= 1, 300, "the first round")
    for site in federation.sites[1:]:
        stop(site)
    before = committed(federation)
    until(federation.ended, 1200, "the end of the run")
    assert started.status("here") == "finished:failed"
    assert (federation.counts()[before + 1 :] == 0).all()


def fill(path: Path) -> None:
    """Write to `path` until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("with_database", [False, True])
def test_a_full_disk_costs_nothing(started: Processes, tmp_path: Path, with_database: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a tmpfs")
    try:
        federation = Federation(started, disk, disk if with_database else None, served=with_database)
        rounds = 5
        federation.run(f"rounds={rounds}")
        until(lambda: committed(federation) >= 1, 300, "the first round")
        fill(disk / "ballast")
        time.sleep(60)
        (disk / "ballast").unlink()
        until(federation.ended, 900, "the end of the run")
        assert started.status("here") == "finished:completed"
        federation.assert_exact(rounds)
    finally:
        started.end()
        subprocess.run(["umount", "-l", str(disk)], check=False)
