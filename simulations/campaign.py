"""All runs of an experiment, rule by rule and seed by seed, with a progress bar each."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import Manager, get_context
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from corymb.server import RoundRecord
from corymb.simulations.experiment import Experiment
from corymb.simulations.federation import run
from corymb.simulations.settings import RuleSettings

Ticket = tuple[RuleSettings, int]  # one run: a rule and a seed
Tell = Callable[[RoundRecord], None]


def journal_folder(folder: Path, rule: RuleSettings, seed: int) -> Path:
    """Where a run keeps its journal."""
    return folder / "journals" / f"{rule.slug}-seed{seed}"


def run_all(experiment: Experiment, folder: Path, console: Console, jobs: int = 1) -> None:
    """Run every rule with every seed, `jobs` at a time in processes of their own when there are more than one."""
    tickets = [(rule, seed) for rule in experiment.rules for seed in experiment.seeds]
    with _progress(console) as progress:
        bars = {
            _key(ticket): progress.add_task(
                escape(f"{ticket[0].title} seed {ticket[1]}"), total=experiment.rounds, measured="", start=False
            )
            for ticket in tickets
        }
        if jobs == 1:
            for ticket in tickets:
                _run(experiment, ticket, folder, partial(_advance, progress, bars[_key(ticket)]), cores())
        else:
            _run_in_processes(experiment, tickets, folder, progress, bars, jobs)


def _run_in_processes(
    experiment: Experiment,
    tickets: list[Ticket],
    folder: Path,
    progress: Progress,
    bars: dict[str, TaskID],
    jobs: int,
) -> None:
    with Manager() as manager, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        news: Any = manager.Queue()
        listener = Thread(target=_listen, args=(news, progress, bars), daemon=True)
        listener.start()
        try:
            futures = [pool.submit(_run_and_tell, experiment, ticket, folder, news) for ticket in tickets]
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            news.put(None)
            listener.join()


def _run_and_tell(experiment: Experiment, ticket: Ticket, folder: Path, news: Any) -> None:
    def tell(record: RoundRecord) -> None:
        news.put((_key(ticket), record))

    _run(experiment, ticket, folder, tell, workers=1)


def _listen(news: Any, progress: Progress, bars: dict[str, TaskID]) -> None:
    while (item := news.get()) is not None:
        key, record = item
        _advance(progress, bars[key], record)


def _run(experiment: Experiment, ticket: Ticket, folder: Path, tell: Tell, workers: int) -> None:
    rule, seed = ticket
    logging.getLogger("flwr").setLevel(logging.WARNING)  # the progress bar says it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models run slower on several, and sums differ with their number
    gc.freeze()  # half a million objects of the libraries, which Python's collector would look through again and again
    try:
        run(experiment, rule, seed, journal_folder(folder, rule, seed), tell, workers)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(ticket: Ticket) -> str:
    return f"{ticket[0].title}\n{ticket[1]}"


def _advance(progress: Progress, bar: TaskID, record: RoundRecord) -> None:
    progress.start_task(bar)
    accuracy = f"accuracy {record.server['accuracy']:.3f}, " if "accuracy" in record.server else ""
    if accuracy:
        progress.update(bar, measured=f"{accuracy}{len(record.admitted)} clients")
    progress.update(bar, completed=record.round)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        refresh_per_second=4,
    ) as progress:
        yield progress
