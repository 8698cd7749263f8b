"""All runs of one experiment or several, each experiment resolved once, with a progress bar for each run."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from corymb.server import RoundRecord
from corymb.simulations.data.clients import Client
from corymb.simulations.engine.workers import can_fork
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import Key, Resolved, resolve
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.simulations.results.folder import FinishedRun, collect_run, journal_folder
from corymb.simulations.results.progress import Board, progress
from corymb.simulations.results.ray import run_with_ray
from corymb.simulations.results.run import OnRound, Run, clients_of

OFTEN = 0.2  # seconds between two looks at the runs of other processes

Plan = tuple[Resolved, Path]  # what is run, and the folder for its results


class Ticket(NamedTuple):
    """One run: which plan's, a rule and a seed, and its number among all runs."""

    plan: int
    rule: ExperimentRule
    seed: int
    number: int


class Tickets:
    """The runs of `plans` in the order in which results show them; they run seed by seed, as clients are made once."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        numbers = count()
        self.shown = [
            [
                Ticket(place, rule, seed, next(numbers))
                for rule in resolved.experiment.rules
                for seed in resolved.experiment.seeds
            ]
            for place, (resolved, _) in enumerate(plans)
        ]

    def titles(self) -> list[tuple[str, int]]:
        """What each run's bar is called, and its rounds."""
        named = len(self.plans) > 1
        experiments = [resolved.experiment for resolved, _ in self.plans]
        return [
            (f"{experiments[t.plan].name} " * named + f"{t.rule.title} seed {t.seed}", experiments[t.plan].rounds)
            for mine in self.shown
            for t in mine
        ]

    def in_order(self, place: int) -> list[Ticket]:
        """The runs of one plan, those that meet the same clients after one another."""
        resolved, _ = self.plans[place]
        return sorted(self.shown[place], key=lambda ticket: resolved.key(ticket.rule, ticket.seed))


def run_all(plans: Sequence[Plan], console: Console, jobs: int = 1) -> Generator[list[FinishedRun], None, None]:
    """The runs of each of `plans`, every rule with every seed, as soon as the last of them is over.

    With `jobs` above one, so many run at a time in processes of their own; closing this ends them. Raises
    `ChildProcessError` when one of them dies.
    """
    tickets = Tickets(plans)
    if jobs > 1:
        yield from _in_processes(tickets, console, jobs)
        return
    board = Board(sum(map(len, tickets.shown)))
    with progress(tickets.titles(), board, console) as show, _quietly(), Clients(cores()) as clients:

        def tell(number: int, record: RoundRecord) -> None:
            board.tell(number, record)
            show(number)

        for place, mine in enumerate(tickets.shown):
            finished = {
                t.number: _run(plans[place], t, clients, partial(tell, t.number)) for t in tickets.in_order(place)
            }
            yield [finished[ticket.number] for ticket in mine]


class Clients:
    """The clients of one scenario, kept for as long as runs meet the same; their engine has so many `workers`."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._made: tuple[int, Key, Client] | None = None  # of which plan
        self._stack = ExitStack()

    def of(self, plan: int, resolved: Resolved, key: Key) -> Client:
        """The clients of that scenario of a plan."""
        if self._made is None or self._made[:2] != (plan, key):
            self.close()
            self._made = (plan, key, self._stack.enter_context(clients_of(resolved, key, self._workers)))
        return self._made[2]

    def close(self) -> None:
        """End what trains them."""
        self._made = None
        self._stack.close()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(plan: Plan, ticket: Ticket, clients: Clients, tell: OnRound) -> FinishedRun:
    (resolved, folder), rule, seed = plan, ticket.rule, ticket.seed
    experiment, journal = resolved.experiment, journal_folder(folder, rule, seed)
    if experiment.engine == "ray":
        run_with_ray(resolved, experiment.rules.index(rule), seed, journal, tell)
    else:
        app = clients.of(ticket.plan, resolved, resolved.key(rule, seed))
        Run(resolved, rule, seed).on_this_machine(app, journal, tell)
    return collect_run(experiment, folder, rule, seed)


@contextmanager
def _quietly() -> Iterator[None]:
    """One thread, as small models run slower on several and sums differ with their number; the bars say the rest."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # half a million objects of the libraries, which Python's collector would look through again and again
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _in_processes(tickets: Tickets, console: Console, jobs: int) -> Iterator[list[FinishedRun]]:
    number = sum(map(len, tickets.shown))
    # Forked from this one where that can be, they have the libraries and all that was resolved.
    forks = can_fork()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    board = Board(number, context)
    given: Any = list(tickets.plans)
    if not forks:
        given = [(resolved.experiment, folder) for resolved, folder in tickets.plans]
    begin: Any = partial(_begin, board, given)
    pool = ProcessPoolExecutor(min(jobs, number), context, begin)
    try:
        futures: dict[int, Future[FinishedRun]] = {
            ticket.number: pool.submit(_run_here, ticket)
            for place in range(len(tickets.plans))
            for ticket in tickets.in_order(place)
        }
        with progress(tickets.titles(), board, console) as show:  # its thread begins after the processes
            for mine in tickets.shown:
                waiting = {futures[ticket.number] for ticket in mine}
                while waiting:
                    done, waiting = wait(waiting, OFTEN, FIRST_COMPLETED)
                    for each in range(number):
                        show(each)
                    for future in done:
                        future.result()
                yield [futures[ticket.number].result() for ticket in mine]
    except BrokenProcessPool:
        message = "The process of a run has died, maybe for want of memory; have fewer run at a time (--jobs)."
        raise ChildProcessError(message) from None
    finally:
        board.end()
        pool.shutdown(cancel_futures=True)


_board: Board  # in a process of ours
_given: list[tuple[Resolved | Experiment, Path]]
_clients: Clients


def _begin(board: Board, given: list[tuple[Resolved | Experiment, Path]]) -> None:
    global _board, _given, _clients
    _board, _given, _clients = board, given, Clients(workers=1)


def _run_here(ticket: Ticket) -> FinishedRun:
    _board.require_more()
    found, folder = _given[ticket.plan]
    if isinstance(found, Experiment):
        found = resolve(found)
        _given[ticket.plan] = (found, folder)
    with _quietly():
        return _run((found, folder), ticket, _clients, partial(_board.tell, ticket.number))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
