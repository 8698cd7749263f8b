"""Run all runs of one or several experiments, one by one or in parallel, with a progress bar for each run."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
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
from corymb.simulations.cores import can_fork, cores
from corymb.simulations.data.clients import Client
from corymb.simulations.experiments.experiment import Experiment
from corymb.simulations.experiments.resolved import Key, Resolved, resolve
from corymb.simulations.experiments.settings import ExperimentRule
from corymb.simulations.results.folder import FinishedRun, collect_run, journal_folder, rounds_in
from corymb.simulations.results.progress import Board, Title, progress
from corymb.simulations.results.ray import run_with_ray
from corymb.simulations.results.run import OnRound, Run, clients_of
from corymb.simulations.results.score import Score

POLL_SECONDS = 0.2  # between two updates of the progress bars of other processes

OnSeedRound = Callable[[int, RoundRecord], None]  # called with the seed of a run
Plan = tuple[Resolved, Path]  # an experiment, and the folder for its results


class PlannedRun(NamedTuple):
    """A run to do: the index of its plan, its rule and seed, and its number among all runs."""

    plan: int
    rule: ExperimentRule
    seed: int
    number: int


class Schedule:
    """The runs of `plans`. `shown[i]` are those of plan `i` in the order of results: by rule, then by seed."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        numbers = count()
        self.shown = [
            [
                PlannedRun(plan, rule, seed, next(numbers))
                for rule in resolved.experiment.rules
                for seed in resolved.experiment.seeds
            ]
            for plan, (resolved, _) in enumerate(plans)
        ]
        self.keys = [key for _, _, key in self.titles()]

    def titles(self) -> list[Title]:
        """Return the title of each run's progress bar, its number of rounds, and the metric that it shows."""
        with_name = len(self.plans) > 1
        experiments = [resolved.experiment for resolved, _ in self.plans]
        return [
            (
                f"{experiments[run.plan].name} " * with_name + f"{run.rule.title} seed {run.seed}",
                experiments[run.plan].rounds,
                Score.of(experiments[run.plan]).key,
            )
            for runs in self.shown
            for run in runs
        ]

    def in_order(self, plan: int) -> list[PlannedRun]:
        """Return the runs of a plan in the order of execution: by scenario, so that each client app is made once."""
        resolved, _ = self.plans[plan]
        return sorted(self.shown[plan], key=lambda run: resolved.key(run.rule, run.seed))


def run_all(
    plans: Sequence[Plan], console: Console, jobs: int = 1, on_round: OnSeedRound | None = None
) -> Generator[list[FinishedRun], None, None]:
    """Run every rule with every seed of each of `plans`, and yield the runs of a plan when its last run ends.

    With `jobs` above 1, that many runs are executed in parallel, each in its own process; closing the generator ends
    them. With one job, `on_round` is called with the seed and the record of each round, and may stop the run by an
    exception. Raises `ChildProcessError` if a process dies.
    """
    schedule = Schedule(plans)
    if jobs > 1:
        yield from _run_in_processes(schedule, console, jobs)
        return
    board = Board(sum(map(len, schedule.shown)))
    with progress(schedule.titles(), board, console) as show, _quiet_single_thread(), Clients(cores()) as clients:

        def after_round(run: PlannedRun, record: RoundRecord) -> None:
            board.update(run.number, schedule.keys[run.number], record)
            show(run.number)
            if on_round is not None:
                on_round(run.seed, record)

        for plan, runs in enumerate(schedule.shown):
            finished = {
                run.number: _run(plans[plan], run, clients, partial(after_round, run))
                for run in schedule.in_order(plan)
            }
            yield [finished[run.number] for run in runs]


class Clients:
    """A cache of one client app, reused while consecutive runs have the same scenario.

    Its training engine may use up to `workers` processes.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        # The index of the plan, the scenario, whether the clients train together; and the app.
        self._cached: tuple[tuple[int, Key, bool], Client] | None = None
        self._stack = ExitStack()

    def of(self, plan: int, resolved: Resolved, key: Key, together: bool) -> Client:
        """Return the client app of the scenario `key` of a plan, whose clients train `together` or one by one."""
        wanted = (plan, key, together)
        if self._cached is None or self._cached[0] != wanted:
            self.close()
            self._cached = (wanted, self._stack.enter_context(clients_of(resolved, key, self.workers, together)))
        return self._cached[1]

    def close(self) -> None:
        """Close the training engine."""
        self._cached = None
        self._stack.close()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(plan: Plan, run: PlannedRun, clients: Clients, on_round: OnRound) -> FinishedRun:
    """Execute `run`, whose journal goes into the folder of `plan`, and return its results."""
    (resolved, folder), rule, seed = plan, run.rule, run.seed
    experiment, journal = resolved.experiment, journal_folder(folder, rule, seed)
    if rounds_in(journal) >= experiment.rounds:  # before it was resumed
        return collect_run(experiment, folder, rule, seed)
    if experiment.engine == "ray":
        run_with_ray(resolved, experiment.rules.index(rule), seed, journal, on_round)
    else:
        one_run = Run(resolved, rule, seed)
        if experiment.devices_for(rule).is_timed:  # what was under way when it was stopped is not in the journal
            shutil.rmtree(journal, ignore_errors=True)
        app = clients.of(run.plan, resolved, resolved.key(rule, seed), one_run.obstacle is None)
        workers = clients.workers if experiment.engine == "auto" else 1
        one_run.run_locally(app, journal, on_round, workers)
    return collect_run(experiment, folder, rule, seed)


@contextmanager
def _quiet_single_thread() -> Iterator[None]:
    """Use one thread in torch and log warnings only.

    Small models run slower on several threads, and sums round differently with their number.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # exclude half a million library objects from each garbage collection
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _run_in_processes(schedule: Schedule, console: Console, jobs: int) -> Iterator[list[FinishedRun]]:
    """See `run_all`, for `jobs` above 1."""
    total = sum(map(len, schedule.shown))
    # Forked processes share the imported libraries and the resolved experiments with this one.
    is_forked = can_fork()
    context: Any = multiprocessing.get_context("fork" if is_forked else "spawn")
    board = Board(total, context)
    plans: Any = list(schedule.plans)
    if not is_forked:
        plans = [(resolved.experiment, folder) for resolved, folder in schedule.plans]
    initializer: Any = partial(_init_worker, board, plans)
    pool = ProcessPoolExecutor(min(jobs, total), context, initializer)
    try:
        futures: dict[int, Future[FinishedRun]] = {
            run.number: pool.submit(_run_in_worker, run)
            for plan in range(len(schedule.plans))
            for run in schedule.in_order(plan)
        }
        with progress(schedule.titles(), board, console) as show:  # after the fork, as it starts a thread
            for runs in schedule.shown:
                pending = {futures[run.number] for run in runs}
                while pending:
                    done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                    for number in range(total):
                        show(number)
                    for future in done:
                        future.result()
                yield [futures[run.number].result() for run in runs]
    except BrokenProcessPool:
        message = "The process of a run died, possibly because memory ran out; reduce --jobs."
        raise ChildProcessError(message) from None
    finally:
        board.stop()
        pool.shutdown(cancel_futures=True)


_board: Board  # these three are set in worker processes only
_plans: list[tuple[Resolved | Experiment, Path]]
_clients: Clients


def _init_worker(board: Board, plans: list[tuple[Resolved | Experiment, Path]]) -> None:
    """Set the globals of a worker process."""
    global _board, _plans, _clients
    _board, _plans, _clients = board, plans, Clients(workers=1)


def _run_in_worker(run: PlannedRun) -> FinishedRun:
    """Execute `run` in a worker process, and resolve its experiment first if the process was spawned."""
    _board.check_running()
    experiment, folder = _plans[run.plan]
    if isinstance(experiment, Experiment):
        experiment = resolve(experiment)
        _plans[run.plan] = (experiment, folder)
    with _quiet_single_thread():
        key = Score.of(experiment.experiment).key
        return _run((experiment, folder), run, _clients, partial(_board.update, run.number, key))
