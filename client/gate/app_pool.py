"""The processes of apps at a site: one for each run under way, and one that waits for the next run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from corymb.client.gate.sandbox import sandboxed

MOST_PROCESSES = 2  # that are kept
IDLE_SECONDS = 600.0  # without a task, after which the process of a run is ended
DYING_SECONDS = 2.0  # that a process may take from closing its connection to its end


@dataclass
class AppProcess:
    """A process, the `writer` of its log, and the gate's end of the connection to it.

    `run` names its run and app, "" while it has none. `user` is the task that uses it, 0 for none; `used` is when
    the last one ended.
    """

    process: subprocess.Popen[bytes]
    writer: subprocess.Popen[bytes]
    connection: socket.socket
    run: str = ""
    user: int = 0
    used: float = 0.0

    def end(self) -> None:
        """Kill the process, if it still lives."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        with suppress(subprocess.TimeoutExpired):
            self.writer.wait(DYING_SECONDS)
        self.writer.kill()
        self.writer.wait()


class AppPool:
    """The processes of the site whose kit is `folder`; they log to the file `log`. One task at a time uses each."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log
        self._processes: list[AppProcess] = []  # the one used last at the end
        self._spare: AppProcess | None = None
        self._sandbox: tuple[bool, tuple[Path, ...]] = (True, ())  # of the spare

    def prepare(self, sandbox: bool, data: Iterable[Path]) -> None:
        """Start a spare process, unless there is one with these settings. Raises `Refusal` if it cannot be started."""
        wanted = (sandbox, tuple(data))
        if self._spare is not None and (self._sandbox != wanted or self._spare.process.poll() is not None):
            self._spare.end()
            self._spare = None
        if self._spare is None:
            self._spare, self._sandbox = _begin(self._folder, self._log, *wanted), wanted

    def of(self, run: str, user: int) -> tuple[AppProcess, bool]:
        """Return a process for a task of `run`, and whether it is new and needs its app. `user` names the task."""
        for app_process in [each for each in self._processes if each.process.poll() is not None]:
            self._end(app_process)
        free = [each for each in self._processes if each.run == run and not each.user]
        is_new = not free
        if is_new:
            assert self._spare is not None
            free, self._spare = [self._spare], None
        else:
            self._processes.remove(free[0])
        free[0].run, free[0].user = run, user
        self._processes.append(free[0])
        idle = [each for each in self._processes if not each.user]
        for app_process in idle[: max(0, len(self._processes) - MOST_PROCESSES)]:
            self._end(app_process)
        return free[0], is_new

    def release(self, user: int) -> None:
        """Let other tasks of the run use the process of the task `user`, which has ended."""
        for app_process in self._processes:
            if app_process.user == user:
                app_process.user, app_process.used = 0, time.monotonic()

    def forget(self, user: int, has_ended: bool = False) -> str:
        """End the process of the task `user`. Returns how it has ended before, "" if it still lived.

        `has_ended` says that it has closed its connection.
        """
        for app_process in [each for each in self._processes if each.user == user]:
            code = None
            with suppress(subprocess.TimeoutExpired):
                code = app_process.process.wait(DYING_SECONDS if has_ended else 0.0)
            self._end(app_process)
            return "" if code is None else f"with signal {-code}" if code < 0 else f"with exit code {code}"
        return ""

    def end_idle(self) -> None:
        """End the processes that no task has used for a while."""
        for app_process in [each for each in self._processes if not each.user]:
            if time.monotonic() - app_process.used > IDLE_SECONDS:
                self._end(app_process)

    def close(self) -> None:
        """End all processes."""
        for app_process in [*self._processes, *([self._spare] if self._spare else [])]:
            app_process.end()

    def _end(self, app_process: AppProcess) -> None:
        app_process.end()
        self._processes.remove(app_process)


def _begin(folder: Path, log: Path, sandbox: bool, data: Iterable[Path]) -> AppProcess:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "corymb.client.gate.app_process", str(theirs.fileno())]
    try:
        command = sandboxed(command, data, folder) if sandbox else command
        # Through `cat`, because a process can reopen a file that it has as its output, and change it.
        with log.open("ab") as file:
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        assert writer.stdin is not None
        with writer.stdin as pipe:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, pass_fds=[theirs.fileno()],
                env=None if sandbox else {**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return AppProcess(process, writer, ours)
