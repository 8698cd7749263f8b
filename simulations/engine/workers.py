"""Persistent processes with one thread each, for machines whose cores are better used apart."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from corymb.simulations.engine.block_result import BlockResult
from corymb.simulations.engine.blocks import Task, most_clients
from corymb.simulations.engine.engine import Answered, InProcess, Trainer
from corymb.simulations.engine.remote_block import (
    SLOTS,
    RemoteBlock,
    Worker,
    answer_one,
    receive_answer,
    received,
    send,
)
from corymb.strategies import Layout

AHEAD = 2  # blocks that each worker is given before it has trained them: it never waits for more work
HELD = 8  # blocks for each worker that may be trained and not yet read


def can_fork() -> bool:
    """Whether processes can be forked here, and the model is not on a GPU, of which a fork cannot make use."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()


class Workers:
    """Trains blocks in `processes` of their own, forked from this one, so that they have its data without a copy.

    A round's model lies in shared memory. Which process trains a block has no effect on any result.
    """

    def __init__(self, trainer: Trainer, layout: Layout, processes: int) -> None:
        self._here, self._layout, self.device = InProcess(trainer, layout), layout, trainer.device
        self._start = _shared(1, layout)[0]
        self._generation = 0  # of what is in `_start`
        self._numbers = count()  # of tasks, over all rounds
        self._workers: list[Worker] = []
        context: Any = multiprocessing.get_context("fork")
        for _ in range(processes):
            tasks, its_tasks = context.Pipe()
            questions, its_questions = context.Pipe()
            sums, models = _shared(SLOTS, layout), _shared(most_clients(layout.num_parameters), layout)
            ours = [tasks, questions, *(pipe for w in self._workers for pipe in (w.tasks, w.questions))]
            process = context.Process(
                target=_work,
                args=(its_tasks, its_questions, trainer, layout, self._start, sums, models, ours),
                daemon=True,
            )
            process.start()
            its_tasks.close()
            its_questions.close()
            self._workers.append(Worker(process, tasks, questions, sums, models))

    def train(self, tasks: Sequence[Task], start: Tensor) -> Iterator[Answered]:
        """See `Engine.train`; it ends what is left of the call before."""
        self._end_round()
        self._start.copy_(start)
        self._generation += 1
        waiting = deque((next(self._numbers), task) for task in tasks)
        numbered = dict(waiting)
        self._feed(waiting, 0)
        return self._answers(numbered, waiting, start, self._generation)

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

    def _answers(
        self, tasks: dict[int, Task], waiting: deque[tuple[int, Task]], start: Tensor, generation: int
    ) -> Iterator[Answered]:
        """The blocks in the order of their tasks, whichever is ready first, so that sums come out the same."""
        ready: dict[int, tuple[Worker, Any]] = {}
        try:
            for number, task in tasks.items():
                while number not in ready:
                    if generation != self._generation:
                        raise RuntimeError("The replies of a round were asked for after the next had begun.")
                    for pipe in wait([worker.tasks for worker in self._workers if worker.left]):
                        worker = next(worker for worker in self._workers if worker.tasks is pipe)
                        done, report = self._told(worker)
                        ready[done] = (worker, report)
                    self._feed(waiting, len(ready))
                worker, report = ready.pop(number)
                self._feed(waiting, len(ready))
                if isinstance(report, Exception):
                    yield task, report, None
                else:  # without a name here: it goes when nobody else holds it
                    yield task, RemoteBlock(worker, number, len(task.clients), start, self._layout), report
        finally:
            for number, (worker, _) in ready.items():
                worker.done_with.append(number)

    def _feed(self, waiting: deque[tuple[int, Task]], ready: int) -> None:
        """Give every worker as much work as it may have ahead, the first tasks to the first."""
        for ahead in range(AHEAD):
            for worker in self._workers:
                if waiting and worker.left <= ahead and ready < HELD * len(self._workers):
                    done_with, worker.done_with = worker.done_with, []
                    send(worker.tasks, (self._generation, *waiting.popleft(), done_with))
                    worker.left += 1

    def _told(self, worker: Worker) -> Any:
        worker.left -= 1
        return received(worker.tasks)

    def _end_round(self) -> None:
        """Hear what nobody waited for: blocks that were not read, and sums."""
        for worker in self._workers:
            while worker.left:
                number, _ = self._told(worker)
                worker.done_with.append(number)
            while worker.pending:
                receive_answer(worker)
            worker.answers.clear()


def _shared(rows: int, layout: Layout) -> Tensor:
    """Zeros `[rows, P]` that forked processes share."""
    size = torch.empty(0, dtype=layout.dtype).element_size()
    memory = mmap.mmap(-1, max(1, rows * layout.num_parameters * size))
    return torch.frombuffer(memory, dtype=layout.dtype, count=rows * layout.num_parameters).view(rows, -1)


def _work(
    tasks: Connection,
    questions: Connection,
    trainer: Trainer,
    layout: Layout,
    start: Tensor,
    sums: Tensor,
    models: Tensor,
    others: list[Connection],
) -> None:
    """A worker's life: it ends when the pipes do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(AttributeError, OSError):  # where it may; woken, it lets the server go on, to wake the others
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    for pipe in others:  # of which this process has copies that would keep them open
        pipe.close()
    blocks: dict[int, BlockResult] = {}
    seen, state = 0, layout.split(start)
    with suppress(EOFError, OSError):
        while True:
            if questions in wait([tasks, questions]):
                answer_one(blocks, questions, sums, models)
                continue
            generation, number, task, done_with = tasks.recv()
            while questions.poll():  # sent before it: maybe about blocks that are done with by now
                answer_one(blocks, questions, sums, models)
            for old in done_with:
                blocks.pop(old, None)
            if generation != seen:  # a copy, for blocks that outlive their round
                seen, state = generation, layout.split(start.clone())
            try:
                blocks[number] = trainer.train(state, task.clients, task.settings, task.server_round)
            except Exception as error:
                tasks.send((number, RuntimeError(f"{type(error).__name__}: {error}")))
            else:
                tasks.send((number, blocks[number].report))
