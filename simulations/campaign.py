"""All runs of one experiment or several, rule by rule and seed by seed, with a progress bar each."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import count
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from corymb.server import RoundRecord
from corymb.simulations.engine.workers import can_fork
from corymb.simulations.experiment import Experiment
from corymb.simulations.federation import run
from corymb.simulations.results import Run, collect_run, journal_folder
from corymb.simulations.settings import RuleSettings

OFTEN = 0.2  # seconds between two looks at the runs of other processes

Plan = tuple[Experiment, Path]  # what is run, and the folder for its results


class Ticket(NamedTuple):
    """One run: a rule and a seed of an experiment, and its number among all runs."""

    experiment: Experiment
    folder: Path
    rule: RuleSettings
    seed: int
    number: int


class Board:
    """How far every run is: numbers that all processes share, so that nobody waits for anybody."""

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


_board: Board  # in a process of ours


def run_all(plans: Sequence[Plan], console: Console, jobs: int = 1) -> Generator[list[Run], None, None]:
    """The runs of each of `plans`, every rule with every seed, as soon as the last of them is over.

    With `jobs` above one, so many run at a time in processes of their own; closing this ends them. Raises
    `ChildProcessError` when one of them dies.
    """
    numbers = count()
    tickets = [
        [Ticket(*plan, rule, seed, next(numbers)) for rule in plan[0].rules for seed in plan[0].seeds] for plan in plans
    ]
    if jobs > 1:
        yield from _in_processes(tickets, console, jobs)
        return
    board = Board(next(numbers))
    with _progress(tickets, board, console) as show:
        for mine in tickets:
            yield [_run(ticket, partial(_tell_and_show, board, show, ticket.number), cores()) for ticket in mine]


def _tell_and_show(board: Board, show: Callable[[int], None], number: int, record: RoundRecord) -> None:
    board.tell(number, record)
    show(number)


def _in_processes(tickets: list[list[Ticket]], console: Console, jobs: int) -> Iterator[list[Run]]:
    number = sum(map(len, tickets))
    # Forked from this one where that can be, they need not import the libraries and read the data again.
    context: Any = multiprocessing.get_context("fork" if can_fork() else "spawn")
    board = Board(number, context)
    pool = ProcessPoolExecutor(min(jobs, number), context, _begin, (board,))
    try:
        futures = [[pool.submit(_run_here, ticket) for ticket in mine] for mine in tickets]
        with _progress(tickets, board, console) as show:  # its thread begins after the processes
            while futures:
                mine = futures.pop(0)
                waiting = set(mine)
                while waiting:
                    done, waiting = wait(waiting, OFTEN, FIRST_COMPLETED)
                    for each in range(number):
                        show(each)
                    for future in done:
                        future.result()
                yield [future.result() for future in mine]
    except BrokenProcessPool:
        message = "The process of a run has died, maybe for want of memory; have fewer run at a time (--jobs)."
        raise ChildProcessError(message) from None
    finally:
        board.end()
        pool.shutdown(cancel_futures=True)


def _begin(board: Board) -> None:
    global _board
    _board = board


def _run_here(ticket: Ticket) -> Run:
    _board.require_more()
    return _run(ticket, partial(_board.tell, ticket.number), workers=1)


def _run(ticket: Ticket, tell: Callable[[RoundRecord], None], workers: int) -> Run:
    experiment, folder, rule, seed, _ = ticket
    logging.getLogger("flwr").setLevel(logging.WARNING)  # the progress bar says it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models run slower on several, and sums differ with their number
    gc.freeze()  # half a million objects of the libraries, which Python's collector would look through again and again
    try:
        run(experiment, rule, seed, journal_folder(folder, rule, seed), tell, workers)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    return collect_run(experiment, folder, rule, seed)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress(tickets: list[list[Ticket]], board: Board, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar for each ticket; what it gives moves the bar of a number to where the board says that it is."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        refresh_per_second=4,
    ) as progress:
        bars = []
        for experiment, _, rule, seed, _ in (ticket for mine in tickets for ticket in mine):
            title = f"{experiment.name} " * (len(tickets) > 1) + f"{rule.title} seed {seed}"
            bars.append(progress.add_task(escape(title), total=experiment.rounds, measured="", start=False))

        def show(number: int) -> None:
            rounds, measured = board.look(number)
            if rounds:
                progress.start_task(bars[number])
                progress.update(bars[number], completed=rounds, measured=measured)

        yield show
