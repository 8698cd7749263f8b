"""The processes of apps at a site: one for each run under way, and one that waits for the next run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from corymb.client.gate.sandbox import sandboxed

MOST_RUNS = 2  # whose processes are kept
DYING_SECONDS = 2.0  # that a process may take from closing its connection to its end


@dataclass
class AppProcess:
    """A process, and the gate's end of the connection to it."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    is_new: bool = True  # it has not got its app yet

    def end(self) -> None:
        """Kill the process, if it still lives."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class AppPool:
    """Processes that log to the file `log`. `begin` starts one; it is replaced in tests."""

    def __init__(self, log: Path, begin: Callable[[Path, bool, Iterable[Path]], AppProcess] | None = None) -> None:
        self._log, self._begin = log, begin or _begin
        self._runs: dict[str, AppProcess] = {}  # by run and app, the one used last at the end
        self._spare: AppProcess | None = None
        self._sandbox: tuple[bool, tuple[Path, ...]] = (True, ())  # of the spare

    def prepare(self, sandbox: bool, data: Iterable[Path]) -> None:
        """Start a spare process, unless there is one with these settings. Raises `Refusal` if it cannot be started."""
        wanted = (sandbox, tuple(data))
        if self._spare is not None and (self._sandbox != wanted or self._spare.process.poll() is not None):
            self._spare.end()
            self._spare = None
        if self._spare is None:
            self._spare, self._sandbox = self._begin(self._log, *wanted), wanted

    def of(self, run: str) -> AppProcess:
        """Return the process of a run and app, which is named by `run`; the spare one if the run has none."""
        app_process = self._runs.pop(run, None)
        if app_process is not None and app_process.process.poll() is not None:
            app_process.end()
            app_process = None
        if app_process is None:
            assert self._spare is not None
            app_process, self._spare = self._spare, None
        self._runs[run] = app_process
        while len(self._runs) > MOST_RUNS:
            self._runs.pop(next(iter(self._runs))).end()
        return app_process

    def forget(self, run: str, has_ended: bool = False) -> str:
        """End the process of a run. Returns how it has ended before, "" if it still lived.

        `has_ended` says that it has closed its connection.
        """
        app_process, code = self._runs.pop(run, None), None
        if app_process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = app_process.process.wait(DYING_SECONDS if has_ended else 0.0)
            app_process.end()
        return "" if code is None else f"with signal {-code}" if code < 0 else f"with exit code {code}"

    def close(self) -> None:
        """End all processes."""
        for app_process in [*self._runs.values(), *([self._spare] if self._spare else [])]:
            app_process.end()


def _begin(log: Path, sandbox: bool, data: Iterable[Path]) -> AppProcess:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "corymb.client.gate.app_process", str(theirs.fileno())]
    try:
        command = sandboxed(command, data) if sandbox else command
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[theirs.fileno()],
                env=None if sandbox else {**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return AppProcess(process, ours)
