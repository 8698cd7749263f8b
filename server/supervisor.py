"""The program that an operator puts in the place of `flwr-serverapp`: it survives a crash of the ServerApp.

Flower's SuperExec starts `flwr-serverapp` by name from the PATH. This one holds the task, the heartbeat and the log,
and runs the app in a child process. If the child dies, it is started again under the same run, and goes on from its
journal. An exception that comes twice ends the run with its traceback. `corymb supervisor FOLDER` writes the program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from flwr.app import Context
from flwr.serverapp import Grid

from corymb.protocol.flower_tasks import describe_task, run_serverapp_command, run_task
from corymb.protocol.signed_grid import Signer, with_signatures
from corymb.server.deployment.logs import set_up
from corymb.server.rounds.run_failed import RunFailed

# Exit codes of the child: the app raised an exception; the run has achieved nothing; the SuperLink does not answer, or
# answers with an error, as while its disk is full.
RAISED, FAILED, AWAY = 3, 4, 5
MOST_CRASHES = 30  # in a row, without a finished round in between
PROGRESS = re.compile(r"\[ROUND \d+/\d+\]")  # in the line that the round loop logs after each round
# glibc gives the memory of large arrays back to the system at once; by default it would keep much of it.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
LONGEST_PAUSE = 5.0  # seconds between a crash and the next start


@dataclass(frozen=True)
class End:
    """How a child ended: its exit code, negative for a signal; its last line; and whether it has finished a round."""

    code: int
    last_line: str
    has_progress: bool = False


def pause_before_restart(ends: list[End]) -> float | None:
    """Return how many seconds to wait before the child is started again; None if it is not.

    `ends` are those of all children so far. Nothing is started after success, after a run that has achieved nothing, or
    after the same exception twice or `MOST_CRASHES` ends in a row, without a finished round in between.
    """
    last = ends[-1]
    if last.code in (0, FAILED):
        return None
    idle = [*takewhile(lambda end: not end.has_progress, reversed(ends))]
    if last.code == RAISED and len(idle) > 1 and (idle[1].code, idle[1].last_line) == (RAISED, last.last_line):
        return None
    return None if len(idle) >= MOST_CRASHES else min(0.1 * 2 ** max(0, len(idle) - 5), LONGEST_PAUSE)


def supervise(grid: Any, context: Context, server_app_dir: str, server_app_attr: str | None = None) -> Context:
    """Run the app in a child process until it ends well. Raises `RunFailed` if it does not.

    The arguments are those of Flower's function that runs an app.
    """
    task = json.dumps(describe_task(grid, context, server_app_dir, server_app_attr or ""))
    ends: list[End] = []
    while True:
        ends.append(_run_child(task))
        if ends[-1].code == 0:
            return context
        pause = pause_before_restart(ends)
        if pause is None:
            raise RunFailed(f"{ends[-1].last_line or f'exit code {ends[-1].code}'} (after {len(ends) - 1} restarts)")
        how = f"signal {-ends[-1].code}" if ends[-1].code < 0 else f"exit code {ends[-1].code}"
        print(f"The ServerApp ended with {how}; it is started again in {pause:g} s and goes on from its journal.")
        time.sleep(pause)


def _run_child(task: str) -> End:
    last_line, has_progress = "", False
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "corymb.server.supervisor", "--child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=RETURN_MEMORY | os.environ,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(task + "\n")
    child.stdin.flush()  # it stays open: its end tells the child that this process has died
    for line in child.stdout:
        print(line, end="")  # Flower takes it from here to the log of the run
        last_line = line.strip() or last_line
        has_progress = has_progress or bool(PROGRESS.search(line))
    return End(child.wait(), last_line, has_progress)


def _be_the_child() -> None:
    task = json.loads(sys.stdin.readline())
    Thread(target=_die_with_the_parent, daemon=True).start()
    try:
        run_task(task, _prepare)
    except Exception as error:
        sys.stdout.flush()
        traceback.print_exc()
        os._exit(FAILED if isinstance(error, RunFailed) else AWAY if isinstance(error, httpx.HTTPError) else RAISED)
    sys.stdout.flush()
    os._exit(0)  # pulls may still hang in their threads


def _prepare(grid: Grid) -> None:
    """Set up the logs, and sign the messages of a federation that `corymb serve` runs, and check the replies'."""
    set_up(str(grid.run.run_id))
    if kit := os.environ.get("CORYMB_KIT"):
        with_signatures(grid, Signer(Path(kit)))


def _die_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    if "--child" in sys.argv:
        _be_the_child()
    else:
        run_serverapp_command(supervise)
