"""The progress of all runs, in memory that their processes share, and its progress bars."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from math import isnan, nan
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from corymb.server import RoundRecord

SECONDS_BETWEEN_LINES = 60.0
Title = tuple[str, int, str]  # of a run, its number of rounds, and the metric that is shown


class Board:
    """The progress of each run, in shared memory. It has no locks, as a process that dies would keep its lock."""

    def __init__(self, runs: int, context: Any = multiprocessing) -> None:
        self._rounds = context.RawArray("i", runs)
        self._score = context.RawArray("d", [nan] * runs)  # of the last test, and its number of clients
        self._clients = context.RawArray("i", runs)
        self._stopped = context.RawValue("b", 0)
        self._process = os.getpid()

    def update(self, number: int, key: str, record: RoundRecord) -> None:
        """Record a round of run `number`, whose tests are shown by the metric `key`.

        Raises `CancelledError` after `stop`.
        """
        self.check_running()
        self._rounds[number] = record.round
        if key in record.server:
            self._score[number], self._clients[number] = record.server[key], len(record.admitted)

    def read(self, number: int, key: str) -> tuple[int, str]:
        """Return the rounds that run `number` has finished, and a text on its last test by the metric `key`."""
        value, count = self._score[number], self._clients[number]
        measured = "" if isnan(value) else f"{key} {value:.3f}, {count} client{'s' * (count != 1)}"
        return self._rounds[number], measured

    def stop(self) -> None:
        """Stop all runs after their current round."""
        self._stopped.value = 1

    def check_running(self) -> None:
        """Raise `CancelledError` after `stop`, and in a worker process whose parent has ended."""
        is_orphan = self._process not in (os.getpid(), os.getppid())
        if self._stopped.value or is_orphan:
            raise CancelledError("The run was stopped, as another run failed or was cancelled.")


@contextmanager
def progress(titles: Sequence[Title], board: Board, console: Console) -> Iterator[Callable[[int], None]]:
    """Show a bar for each of `titles` (title, number of rounds, metric); yield a function that updates a bar.

    Without a terminal, each run prints a line a minute, and one when it ends.
    """
    if not console.is_terminal:
        yield _Lines(titles, board, console).show
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        refresh_per_second=4,
    ) as bars:
        tasks = [bars.add_task(escape(title), total=rounds, measured="", start=False) for title, rounds, _ in titles]

        def show(number: int) -> None:
            rounds, measured = board.read(number, titles[number][2])
            if rounds:
                bars.start_task(tasks[number])
                bars.update(tasks[number], completed=rounds, measured=measured)

        yield show


class _Lines:
    """Lines of progress, for output that is not a terminal."""

    def __init__(self, titles: Sequence[Title], board: Board, console: Console) -> None:
        self._titles, self._board, self._console = titles, board, console
        self._printed = dict.fromkeys(range(len(titles)), (0, time.monotonic()))  # the round and time of the last line

    def show(self, number: int) -> None:
        """Print a line about run `number`, if it is time for one."""
        rounds, measured = self._board.read(number, self._titles[number][2])
        (title, total, _), (printed, when) = self._titles[number], self._printed[number]
        if rounds > printed and (rounds == total or time.monotonic() - when > SECONDS_BETWEEN_LINES):
            self._printed[number] = (rounds, time.monotonic())
            self._console.print(f"{title}  round {rounds}/{total}  {measured}", markup=False, soft_wrap=True)
