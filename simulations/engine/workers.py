"""The engine that trains in persistent worker processes with one thread each, to use several cores."""

from __future__ import annotations

import mmap
import multiprocessing
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
from corymb.simulations.engine.blocks import MatrixBlock, Task, Trainer, max_clients
from corymb.simulations.engine.engine import Outcome
from corymb.simulations.engine.remote_block import (
    SLOTS,
    RemoteBlock,
    Worker,
    handle_query,
    receive_result,
    received,
    send,
)
from corymb.strategies import Layout
from corymb.strategies.core.rows import Rows

MAX_UNFINISHED = 2  # tasks that a worker may have at once, so that it never waits for its next one
MOST_AHEAD = 1 << 15  # bytes of a task that a worker gets before it has finished another one; a pipe has room for them
MAX_UNREAD = 8  # blocks per worker that may be trained and not yet taken from the iterator


class WorkerEngine:
    """Trains blocks in worker `processes`, forked from this one, so that they share its data without a copy.

    The model that a round starts from, and the rule's second vector, are in shared memory. The results do not depend on
    which process trains a block.
    """

    def __init__(self, trainer: Trainer, layout: Layout, processes: int) -> None:
        self._layout, self.device = layout, trainer.device
        self._start, self._second = _shared(2, layout)
        self._has_second = False
        self._generation = 0  # counts the models that `_start` has held
        self._numbers = count()  # of tasks, over all rounds
        self._workers: list[Worker] = []
        context: Any = multiprocessing.get_context("fork")
        for _ in range(processes):
            tasks, worker_tasks = context.Pipe()
            queries, worker_queries = context.Pipe()
            vectors, models = _shared(SLOTS, layout), _shared(max_clients(layout.num_parameters), layout)
            server_pipes = [tasks, queries, *(pipe for w in self._workers for pipe in (w.tasks, w.queries))]
            process = context.Process(
                target=_work,
                args=(
                    worker_tasks,
                    worker_queries,
                    trainer,
                    layout,
                    (self._start, self._second),
                    vectors,
                    models,
                    server_pipes,
                ),
                daemon=True,
            )
            process.start()
            worker_tasks.close()
            worker_queries.close()
            self._workers.append(Worker(process, tasks, queries, vectors, models))

    def train(self, tasks: Sequence[Task], start: Tensor, second: Tensor | None = None) -> Iterator[Outcome]:
        """See `Engine.train`; discards the blocks that remain from the previous call."""
        self._end_round()
        self._start.copy_(start)
        self._has_second = second is not None
        if second is not None:
            self._second.copy_(second)
        self._generation += 1
        waiting = deque((next(self._numbers), task) for task in tasks)
        numbered = dict(waiting)
        self._send_tasks(waiting, 0)
        return self._outcomes(numbered, waiting, start, self._generation)

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.tasks.close()
            worker.queries.close()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
        self._workers = []

    def _outcomes(
        self, tasks: dict[int, Task], waiting: deque[tuple[int, Task]], start: Tensor, generation: int
    ) -> Iterator[Outcome]:
        """Yield the blocks in the order of their tasks, not of their arrival, so that sums are reproducible."""
        ready: dict[int, tuple[Worker, Any]] = {}
        try:
            for number, task in tasks.items():
                while number not in ready:
                    if generation != self._generation:
                        raise RuntimeError(
                            "The replies of a round were read after the next round had begun; read all of them first."
                        )
                    for pipe in wait([worker.tasks for worker in self._workers if worker.unfinished]):
                        worker = next(worker for worker in self._workers if worker.tasks is pipe)
                        finished, report = self._receive_report(worker)
                        ready[finished] = (worker, report)
                    self._send_tasks(waiting, len(ready))
                worker, report = ready.pop(number)
                self._send_tasks(waiting, len(ready))
                if isinstance(report, Exception):
                    yield task, report, None
                else:  # no local variable refers to the block, so that it is deleted when the caller drops it
                    yield task, self._block(worker, number, task, start), report
        finally:
            for number, (worker, _) in ready.items():
                worker.released.append(number)

    def _block(self, worker: Worker, number: int, task: Task, start: Tensor) -> Rows:
        """Return a trained block; its models, if each client had its own start."""
        block = RemoteBlock(worker, number, len(task.clients), start, self._layout)
        if not task.has_own_starts:
            return block
        models = torch.empty(len(task.clients), self._layout.num_parameters, dtype=self._layout.dtype)
        block.copy_to(list(enumerate(models.unbind())))()
        return MatrixBlock(models, self._layout)

    def _send_tasks(self, waiting: deque[tuple[int, Task]], ready: int) -> None:
        """Send each worker as many tasks as it may have, one to each worker before a second one to any.

        A worker gets no large task ahead: while this process waits for room in the pipe, the worker could do the same.
        """
        for unfinished in range(MAX_UNFINISHED):
            for worker in self._workers:
                if waiting and worker.unfinished and waiting[0][1].nbytes > MOST_AHEAD:
                    continue
                if waiting and worker.unfinished <= unfinished and ready < MAX_UNREAD * len(self._workers):
                    released, worker.released = worker.released, []
                    send(worker.tasks, (self._generation, self._has_second, *waiting.popleft(), released))
                    worker.unfinished += 1

    def _receive_report(self, worker: Worker) -> Any:
        worker.unfinished -= 1
        return received(worker.tasks)

    def _end_round(self) -> None:
        """Receive and discard the blocks and query results that were not read."""
        for worker in self._workers:
            while worker.unfinished:
                number, _ = self._receive_report(worker)
                worker.released.append(number)
            while worker.pending:
                receive_result(worker)
            worker.results.clear()


def _shared(rows: int, layout: Layout) -> Tensor:
    """Return zeros `[rows, P]` in memory that forked processes share."""
    size = torch.empty(0, dtype=layout.dtype).element_size()
    memory = mmap.mmap(-1, max(1, rows * layout.num_parameters * size))
    return torch.frombuffer(memory, dtype=layout.dtype, count=rows * layout.num_parameters).view(rows, -1)


def _work(
    tasks: Connection,
    queries: Connection,
    trainer: Trainer,
    layout: Layout,
    shared: tuple[Tensor, Tensor],
    vectors: Tensor,
    models: Tensor,
    server_pipes: list[Connection],
) -> None:
    """Run the main loop of a worker process; it ends when the server process closes the pipes.

    `shared` are the round's model and the rule's second vector.
    """
    start, second = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    for pipe in server_pipes:  # the fork copied them, and an open copy would keep a pipe from ending
        pipe.close()
    blocks: dict[int, BlockResult] = {}
    current, state = 0, layout.split(start)  # the generation of the model, and the model
    with suppress(EOFError, OSError):
        while True:
            if queries in wait([tasks, queries]):
                handle_query(blocks, queries, vectors, models)
                continue
            generation, has_second, number, task, released = tasks.recv()
            while queries.poll():  # these were sent before the task and may concern the blocks that it releases
                handle_query(blocks, queries, vectors, models)
            for old in released:
                blocks.pop(old, None)
            if generation != current:  # a copy, because blocks may outlive their round
                current, state = generation, layout.split(start.clone())
            try:
                blocks[number] = task.train(trainer, layout, state, second if has_second else None)
            except Exception as error:
                tasks.send((number, RuntimeError(f"{type(error).__name__}: {error}")))
            else:
                tasks.send((number, blocks[number].report))
