"""Persistent processes with one thread each, for machines whose cores are better used apart."""

from __future__ import annotations

import multiprocessing
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from corymb.simulations.engine.blocks import Task, cut_up, with_drift
from corymb.simulations.engine.engine import Answered, InProcess, Trainer
from corymb.simulations.engine.trained import Trained
from corymb.strategies import Layout
from corymb.strategies.fold import COMING

ASKED = COMING + 1  # sums that may be asked for before the first is read
AHEAD = 2  # blocks that each worker is given before it has trained them: it never waits for more work


@dataclass
class _Worker:
    process: Any
    tasks: Connection
    questions: Connection  # about blocks that are trained; they go before tasks
    results: Tensor  # shared [ASKED, P]: the weighted sums that were asked for last
    left: int = 0  # tasks that it was given and has not told of
    asked: int = 0  # sums, over all rounds
    done_with: list[int] = field(default_factory=list)  # blocks that nobody holds any more; it learns of it by and by


class Workers:
    """Trains blocks in `processes` of their own, forked from this one, so that they have its data without a copy.

    A round's model lies in shared memory. Which process trains a block has no effect on any result.
    """

    def __init__(self, trainer: Trainer, layout: Layout, processes: int) -> None:
        self._here, self._layout = InProcess(trainer, layout), layout
        self._start = torch.zeros(layout.num_parameters, dtype=layout.dtype).share_memory_()
        self._numbers = count()  # of tasks, over all rounds
        self._workers: list[_Worker] = []
        context: Any = multiprocessing.get_context("fork")
        for _ in range(processes):
            tasks, its_tasks = context.Pipe()
            questions, its_questions = context.Pipe()
            results = torch.zeros(ASKED, len(self._start), dtype=layout.dtype).share_memory_()
            ours = [tasks, questions, *(pipe for w in self._workers for pipe in (w.tasks, w.questions))]
            process = context.Process(
                target=_work,
                args=(its_tasks, its_questions, trainer, layout, self._start, results, ours),
                daemon=True,
            )
            process.start()
            its_tasks.close()
            its_questions.close()
            self._workers.append(_Worker(process, tasks, questions, results))

    def train(self, tasks: Sequence[Task], start: Tensor) -> Iterator[Answered]:
        """See `Engine.train`."""
        for worker in self._workers:  # what is left of a round that nobody read to its end
            while worker.left:
                self._told(worker)
        self._start.copy_(start)
        waiting = [(next(self._numbers), task) for task in tasks]
        numbered = dict(waiting)
        waiting.reverse()
        first = [waiting[-1 - place :: -len(self._workers)][:AHEAD] for place in range(len(self._workers))]
        for worker, mine in zip(self._workers, first, strict=True):
            self._give(worker, mine)
        del waiting[-AHEAD * len(self._workers) :]
        return self._answers(numbered, waiting, start)

    def train_own(self, task: Task, starts: Tensor) -> Answered:
        """See `Engine.train_own`; in this process."""
        return self._here.train_own(task, starts)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.tasks.close()
            worker.questions.close()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
        self._workers = []

    def _answers(self, tasks: dict[int, Task], waiting: list[tuple[int, Task]], start: Tensor) -> Iterator[Answered]:
        """The blocks in the order of their tasks, whichever is ready first, so that sums come out the same."""
        ready: dict[int, tuple[_Worker, Any]] = {}
        for number, task in tasks.items():
            while number not in ready:
                for pipe in wait([worker.tasks for worker in self._workers if worker.left]):
                    worker = next(worker for worker in self._workers if worker.tasks is pipe)
                    done, report = self._told(worker)
                    ready[done] = (worker, report)
                    self._give(worker, [waiting.pop()] if waiting else [])
            worker, report = ready.pop(number)
            if isinstance(report, Exception):
                yield task, report, None
            else:  # without a name here: it goes when nobody else holds it
                yield task, _RemoteBlock(worker, number, len(task.clients), start, self._layout), report

    def _give(self, worker: _Worker, tasks: list[tuple[int, Task]]) -> None:
        if tasks:
            done_with, worker.done_with = worker.done_with, []
            worker.tasks.send((tasks, done_with))
            worker.left += len(tasks)

    def _told(self, worker: _Worker) -> Any:
        worker.left -= 1
        return _received(worker.tasks)


class _RemoteBlock:
    """A block that lies in a worker for as long as somebody holds this."""

    def __init__(self, worker: _Worker, number: int, clients: int, start: Tensor, layout: Layout) -> None:
        self._worker, self._number, self._clients = worker, number, clients
        self._start, self._layout = start, layout
        self._models: Tensor | None = None
        weakref.finalize(self, _forget, worker, number)

    @property
    def clients(self) -> int:
        """How many there are."""
        return self._clients

    def moves(self, weights: Tensor, origin: Tensor) -> Callable[[], Tensor]:
        """See `strategies.block.Block`; the worker adds up while this process reads on."""
        worker, start = self._worker, self._start
        place = worker.asked % ASKED
        worker.asked += 1
        worker.questions.send(("moved", self._number, (place, weights.tolist())))

        def total() -> Tensor:
            _received(worker.questions)
            return with_drift(worker.results[place], weights, start, origin)

        return total

    def model(self, index: int) -> tuple[Tensor, ...]:
        """See `strategies.block.Block`; all models come over for the first that is asked for."""
        if self._models is None:
            self._worker.questions.send(("models", self._number, None))
            self._models = torch.from_numpy(_received(self._worker.questions))
        return cut_up(self._models[index], self._layout)


def _forget(worker: _Worker, number: int) -> None:
    worker.done_with.append(number)


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("A worker process has died; the machine may be short of memory.") from None


def _work(
    tasks: Connection,
    questions: Connection,
    trainer: Trainer,
    layout: Layout,
    start: Tensor,
    results: Tensor,
    others: list[Connection],
) -> None:
    """A worker's life: it ends when the pipes do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    for pipe in others:  # of which this process has copies that would keep them open
        pipe.close()
    blocks: dict[int, Trained] = {}
    given: deque[tuple[int, Task]] = deque()
    state = layout.split(start)
    with suppress(EOFError, OSError):
        while True:
            if questions in wait([tasks, questions], 0 if given else None):
                _answer(blocks, questions, results)
                continue
            if tasks.poll():
                more, done_with = tasks.recv()
                given.extend(more)
                for number in done_with:
                    blocks.pop(number, None)
            number, task = given.popleft()
            try:
                blocks[number] = trainer.train(state, task.clients, task.settings, task.server_round)
            except Exception as error:
                tasks.send((number, RuntimeError(f"{type(error).__name__}: {error}")))
            else:
                tasks.send((number, blocks[number].report))


def _answer(blocks: dict[int, Trained], questions: Connection, results: Tensor) -> None:
    what, number, value = questions.recv()
    if what == "moved":
        place, weights = value
        results[place] = blocks[number].moved(torch.tensor(weights, dtype=results.dtype))
        questions.send(None)
    else:
        questions.send(blocks[number].models().numpy())
