"""All runs of one experiment or several, rule by rule and seed by seed, with a progress bar each."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from corymb.server import RoundRecord
from corymb.simulations.engine.workers import are_possible
from corymb.simulations.experiment import Experiment
from corymb.simulations.federation import run
from corymb.simulations.results import Run, collect_run, journal_folder
from corymb.simulations.settings import RuleSettings

TELLING = 0.1  # seconds between two times that a run tells how far it is


class Ticket(NamedTuple):
    """One run: a rule and a seed of an experiment whose results go into `folder`."""

    experiment: Experiment
    folder: Path
    rule: RuleSettings
    seed: int


Show = Callable[[int, int, str], None]  # of which ticket how many rounds there are by now, and what was measured last
_news: Any = None  # where a process of ours tells this


def tickets_of(experiment: Experiment, folder: Path) -> list[Ticket]:
    """Every rule with every seed."""
    return [Ticket(experiment, folder, rule, seed) for rule in experiment.rules for seed in experiment.seeds]


def run_all(tickets: Sequence[Ticket], console: Console, jobs: int = 1) -> list[Run]:
    """The runs of `tickets`, `jobs` at a time in processes of their own when there are more than one."""
    if jobs > 1:
        return _in_processes(tickets, console, jobs)
    with _progress(tickets, console) as show:
        return [_run(ticket, number, show, cores()) for number, ticket in enumerate(tickets)]


def _in_processes(tickets: Sequence[Ticket], console: Console, jobs: int) -> list[Run]:
    # Forked from this one where that can be, they have its libraries and its data without a copy.
    context: Any = multiprocessing.get_context("fork" if are_possible() else "spawn")
    news = context.SimpleQueue()
    with ProcessPoolExecutor(jobs, context, _begin, (news,)) as pool:
        futures = [pool.submit(_run_and_tell, ticket, number) for number, ticket in enumerate(tickets)]
        with _progress(tickets, console) as show:  # its thread begins after the processes
            listener = Thread(target=_listen, args=(news, show), daemon=True)
            listener.start()
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)
                news.put(None)
                listener.join()
    return [future.result() for future in futures]


def _begin(news: Any) -> None:
    global _news
    _news = news


def _run_and_tell(ticket: Ticket, number: int) -> Run:
    return _run(ticket, number, lambda *told: _news.put(told), workers=1)


def _listen(news: Any, show: Show) -> None:
    while (told := news.get()) is not None:
        show(*told)


def _run(ticket: Ticket, number: int, show: Show, workers: int) -> Run:
    experiment, folder, rule, seed = ticket
    told, measured = 0.0, ""

    def tell(record: RoundRecord) -> None:
        nonlocal told, measured
        if "accuracy" in record.server:
            measured = f"accuracy {record.server['accuracy']:.3f}, {len(record.admitted)} clients"
        if time.monotonic() - told > TELLING or record.round == experiment.rounds:
            told = time.monotonic()
            show(number, record.round, measured)

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
def _progress(tickets: Sequence[Ticket], console: Console) -> Iterator[Show]:
    """A bar for each ticket, that moves when it is shown how far a run is."""
    several = len({ticket.folder for ticket in tickets}) > 1
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
        for experiment, _, rule, seed in tickets:
            title = f"{experiment.name} {rule.title} seed {seed}" if several else f"{rule.title} seed {seed}"
            bars.append(progress.add_task(escape(title), total=experiment.rounds, measured="", start=False))

        def show(number: int, rounds: int, measured: str) -> None:
            progress.start_task(bars[number])
            progress.update(bars[number], completed=rounds, measured=measured)

        yield show
