"""How far every run is, in numbers that all processes share, and as bars."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from math import isnan, nan
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from corymb.server import RoundRecord


class Board:
    """Plain shared numbers, so that nobody waits for anybody: a lock might go with a process that dies."""

    def __init__(self, runs: int, context: Any = multiprocessing) -> None:
        self._rounds = context.RawArray("i", runs)
        self._accuracy = context.RawArray("d", [nan] * runs)  # when it was last tested, after a round of
        self._clients = context.RawArray("i", runs)
        self._over = context.RawValue("b", 0)

    def tell(self, number: int, record: RoundRecord) -> None:
        """Note a round of a run. Raises `CancelledError` when all is over."""
        self.require_more()
        self._rounds[number] = record.round
        if "accuracy" in record.server:
            self._accuracy[number], self._clients[number] = record.server["accuracy"], len(record.admitted)

    def look(self, number: int) -> tuple[int, str]:
        """The rounds of a run, and what was measured last."""
        accuracy = self._accuracy[number]
        measured = "" if isnan(accuracy) else f"accuracy {accuracy:.3f}, {self._clients[number]} clients"
        return self._rounds[number], measured

    def end(self) -> None:
        """Have all runs end with the round that they are in."""
        self._over.value = 1

    def require_more(self) -> None:
        """Raise `CancelledError` when all is over."""
        if self._over.value:
            raise CancelledError("The other runs have been given up.")


@contextmanager
def progress(titles: Sequence[tuple[str, int]], board: Board, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar for each run with its title and rounds; what it gives moves the bar of a number to where the run is."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        refresh_per_second=4,
    ) as bars:
        tasks = [bars.add_task(escape(title), total=rounds, measured="", start=False) for title, rounds in titles]

        def show(number: int) -> None:
            rounds, measured = board.look(number)
            if rounds:
                bars.start_task(tasks[number])
                bars.update(tasks[number], completed=rounds, measured=measured)

        yield show
