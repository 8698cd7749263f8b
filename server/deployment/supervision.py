"""A small supervisor: it keeps the processes of a kit running, in the foreground or under systemd."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from corymb.server.deployment.processes import Process

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a process is started again
STEADY_SECONDS = 60.0  # after which a process counts as well, and the next pause is the first again
STOP_SECONDS = 10.0  # for a process to end after SIGTERM
LARGEST_LOG = 20_000_000  # bytes; the log before is kept as NAME.log.1
EXIT_LINE = re.compile(r"Exit Code: (\d+)")  # Flower exits with 0 or 1 whatever happens, and prints this
REASONS = {
    "302": "the site's key cannot be read",
    "303": "the connection is not encrypted",
    "305": "the SuperLink refuses the connection or cannot be reached",
    "401": "the SuperExec's secret cannot be read",
    "600": "an address is invalid",
    "603": "the authority's certificate does not fit",
    "605": "the server's certificate is invalid",
    "606": "the versions of Flower do not fit",
}


@dataclass
class Kept:
    """A process that is kept running."""

    process: Process
    log: Path
    running: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    next_start: float = 0.0
    pause: float = FIRST_PAUSE
    changed: dict[Path, float] = field(default_factory=dict)

    def start(self) -> None:
        """Start the process. It dies with this one."""
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.process.command, env={**os.environ, **self.process.environment}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=_die_with_the_parent,
            )  # fmt: skip
        self.started = time.monotonic()
        self.changed = {path: path.stat().st_mtime for path in self.process.reloads_after}

    def last_words(self) -> str:
        """Return why the process has ended, as far as its log says."""
        lines = self.log.read_text(errors="replace").splitlines()[-60:]
        codes = [found.group(1) for line in lines if (found := EXIT_LINE.search(line))]
        if codes and codes[-1] in REASONS:
            return f"Flower's exit code {codes[-1]}: {REASONS[codes[-1]]}"
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "nothing in its log")


class Supervisor:
    """Keeps `processes` running, each with a log in `logs`. `attend` is called each second, and may restart some."""

    def __init__(
        self, processes: Iterable[Process], logs: Path, say: Callable[[str], None],
        attend: Callable[[Supervisor], None] = lambda supervisor: None,
    ) -> None:  # fmt: skip
        self._kept = {each.name: Kept(each, logs / f"{each.name}.log") for each in processes}
        self._say, self._attend, self._stopping = say, attend, False

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, and then end all processes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: setattr(self, "_stopping", True))
        try:
            while not self._stopping:
                for kept in self._kept.values():
                    self._tend(kept)
                self._attend(self)
                time.sleep(0.5)
        finally:
            self._end_all()

    def restart(self, name: str, why: str) -> None:
        """End a process; it is started again at once."""
        kept = self._kept[name]
        if kept.running is not None and kept.running.poll() is None:
            self._say(f"{name} is restarted: {why}.")
            _end(kept.running)
            kept.running, kept.next_start, kept.pause = None, 0.0, FIRST_PAUSE

    def seconds_running(self, name: str) -> float:
        """Return for how long a process has been running; 0 if it is not."""
        kept = self._kept[name]
        is_running = kept.running is not None and kept.running.poll() is None
        return time.monotonic() - kept.started if is_running else 0.0

    def _tend(self, kept: Kept) -> None:
        now = time.monotonic()
        if kept.running is None:
            if now >= kept.next_start:
                kept.start()
            return
        code = kept.running.poll()
        if code is None:
            changed = {path: path.stat().st_mtime for path in kept.changed if path.exists()}
            if kept.changed and changed != kept.changed:
                kept.changed = changed
                self._say(f"{kept.process.name} reloads its certificate.")
                kept.running.send_signal(signal.SIGHUP)
            return
        kept.pause = FIRST_PAUSE if now - kept.started > STEADY_SECONDS else min(2 * kept.pause, LONGEST_PAUSE)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._say(f"{kept.process.name} has ended with {how} ({kept.last_words()}); next start in {kept.pause:g} s.")
        kept.running, kept.next_start = None, now + kept.pause

    def _end_all(self) -> None:
        running = [kept.running for kept in reversed(self._kept.values()) if kept.running is not None]
        for process in running:
            process.terminate()
        for process in running:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_the_parent() -> None:
    """Have this process, which is about to become another program, killed when its parent dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
