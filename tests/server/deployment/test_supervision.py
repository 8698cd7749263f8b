"""The supervisor of a kit's processes, and the watchdog of a site."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from corymb.server.deployment.processes import Process
from corymb.server.deployment.supervision import Kept, Supervisor
from corymb.server.deployment.watch import POLL_SECONDS, START_SECONDS, Watchdog
from corymb.tests.e2e.processes import until

CODE = """
import sys; from pathlib import Path
from corymb.server.deployment.processes import Process
from corymb.server.deployment.supervision import Supervisor
folder = Path(sys.argv[1])
def counting(name, more):
    code = f"import os,time; open({str(folder / name)!r}, 'a').write(f'{{os.getpid()}}\\\\n'); {more}"
    return Process(name, [sys.executable, "-c", code])
processes = [counting("stays", "time.sleep(600)"), counting("fails", "print('Exit Code: 305'); exit(1)")]
Supervisor(processes, folder, lambda line: print(line, flush=True)).run()
"""


def starts(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_are_started_again_and_end_with_the_supervisor(number: int, tmp_path: Path) -> None:
    with (tmp_path / "said").open("wb") as log:
        supervisor = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path)], stdout=log, stderr=log)
    try:
        until(lambda: starts(tmp_path / "stays") and len(starts(tmp_path / "fails")) >= 2, 30, "the starts")
        (first,) = starts(tmp_path / "stays")
        os.kill(first, signal.SIGKILL)
        until(lambda: len(starts(tmp_path / "stays")) == 2, 30, "the second start")
        second = starts(tmp_path / "stays")[1]
        supervisor.send_signal(number)
        supervisor.wait(30)
        until(lambda: not is_alive(second), 10, "the end of the process")
    finally:
        supervisor.kill()
        supervisor.wait()
    said = (tmp_path / "said").read_text()
    assert "stays has ended with signal 9 (nothing in its log); next start in 1 s." in said
    assert "Flower's exit code 305: the SuperLink refuses the connection or cannot be reached" in said
    assert said.count("fails has ended") < 6  # the pauses grow


def test_a_changed_certificate_makes_a_process_reload(tmp_path: Path) -> None:
    certificate, mark = tmp_path / "server.crt", tmp_path / "reloaded"
    certificate.write_text("old")
    code = f"import signal,time,pathlib; signal.signal(signal.SIGHUP, lambda *_: pathlib.Path({str(mark)!r}).touch())"
    process = Process("edge", [sys.executable, "-c", f"{code}\nwhile True: time.sleep(0.1)"], {}, (certificate,))
    said: list[str] = []
    supervisor = Supervisor([process], tmp_path, said.append)
    kept: Kept = supervisor._kept["edge"]
    try:
        supervisor._tend(kept)
        time.sleep(1)  # until it listens to the signal
        supervisor._tend(kept)
        assert not said
        certificate.write_text("new")
        os.utime(certificate, (1, 1))
        supervisor._tend(kept)
        until(mark.exists, 10, "the reload")
    finally:
        supervisor._end_all()
    assert said == ["edge reloads its certificate."]


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def restarts(views: Sequence[bool | None], running: float = 600.0) -> list[int]:
    """At which of the server's views, one each few seconds, a watchdog restarts its SuperNode."""
    clock, remaining = Clock(), iter(views)
    watchdog, found = Watchdog(lambda: next(remaining), clock), []
    for index in range(len(views)):
        if watchdog.must_restart(running):
            found.append(index)
        clock.seconds += POLL_SECONDS
    return found


def test_a_supernode_is_restarted_when_the_server_sees_it_offline_twice() -> None:
    assert restarts([True, False, False, True, True]) == [2]
    assert restarts([True, False, True, False, True]) == []
    assert restarts([False] * 5, running=START_SECONDS - 1) == []  # it is starting
    assert restarts([None] * 20) == []  # the server is away; a restart would not help
    assert restarts([True, False, None, False, True]) == [3]
    assert restarts([True] + [False] * 6, running=START_SECONDS + 1) == [2]  # the next start gets longer
