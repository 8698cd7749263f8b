"""Blocks of clients that lie in another process, and what it is asked about them.

Questions are short and go through a pipe, as do short answers; whole models lie in memory that both share. The server
does not wait: it asks, and hears the answers when it wants one of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from corymb.simulations.engine.block_result import BlockResult
from corymb.simulations.engine.blocks import ClientBlock, Targets, copy_rows, offset_of, with_drift
from corymb.strategies import Layout

SLOTS = 4  # sums that a worker may have worked out and that are not yet read
Question = tuple[int, int]  # a block's number, and one of its own


@dataclass
class Worker:
    """A process that trains blocks, as the server sees it."""

    process: Any
    tasks: Connection
    questions: Connection  # about blocks that are trained; they go before tasks
    sums: Tensor  # shared [SLOTS, P]
    models: Tensor  # shared [most clients, P]: those of one block at a time, where they are written out
    left: int = 0  # tasks that it was given and has not told of
    free: list[int] = field(default_factory=lambda: list(range(SLOTS)))  # places in `sums`
    is_writing: bool = False  # to `models`
    pending: dict[Question, Callable[[Any], Any]] = field(default_factory=dict)  # no answer yet; what to do with it
    answers: dict[Question, Any] = field(default_factory=dict)  # that came before they were wanted
    done_with: list[int] = field(default_factory=list)  # blocks that nobody holds any more; it learns of it by and by


class RemoteBlock(ClientBlock):
    """A block that lies in a worker for as long as somebody holds this."""

    def __init__(self, worker: Worker, number: int, clients: int, start: Tensor, layout: Layout) -> None:
        super().__init__(clients, layout)
        self._worker, self._number, self._start = worker, number, start
        self._questions = count()
        weakref.finalize(self, _forget, worker, number)

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`; the worker adds up while this process reads on."""
        worker, slot, start = self._worker, self._free_slot(), self._start

        def take(_: Any) -> Tensor:
            worker.free.append(slot)
            return worker.sums[slot].clone()

        moved = self._ask(take, "moved", slot, weights.tolist())

        def finish() -> None:
            total.add_(with_drift(moved(), weights, start, origin))

        return finish

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Rows`."""
        offset = offset_of(centre, self._start)
        worker, slot = self._worker, self._free_slot()
        if offset is not None:
            worker.sums[slot] = offset

        def take(squares: list[float]) -> Tensor:
            worker.free.append(slot)
            return torch.tensor(squares, dtype=torch.float64)

        return self._ask(take, "squares", slot, offset is not None)

    def _copy_to(self, targets: Targets) -> Callable[[], None]:
        worker = self._worker
        while worker.is_writing:
            receive_answer(worker)
        worker.is_writing = True

        def take(_: Any) -> None:
            worker.is_writing = False
            copy_rows(worker.models, targets)

        return self._ask(take, "models")

    def _free_slot(self) -> int:
        while not self._worker.free:
            receive_answer(self._worker)
        return self._worker.free.pop()

    def _ask(self, take: Callable[[Any], Any], *details: Any) -> Callable[[], Any]:
        worker, question = self._worker, (self._number, next(self._questions))
        worker.pending[question] = take
        send(worker.questions, (question, *details))
        return lambda: _answer_to(worker, question)


def _answer_to(worker: Worker, question: Question) -> Any:
    while question not in worker.answers:
        if question not in worker.pending:
            raise RuntimeError("A block was asked something in one round and read in the next.")
        receive_answer(worker)
    return worker.answers.pop(question)


def receive_answer(worker: Worker) -> None:
    """Take one answer from a worker; it is copied, so that its place is free again."""
    question, answer = received(worker.questions)
    worker.answers[question] = worker.pending.pop(question)(answer)


def _forget(worker: Worker, number: int) -> None:
    worker.done_with.append(number)


def send(pipe: Connection, message: Any) -> None:
    """Raises `ChildProcessError` where nobody is at the other end."""
    try:
        pipe.send(message)
    except OSError:
        raise ChildProcessError("A worker process has died; the machine may be short of memory.") from None


def received(pipe: Connection) -> Any:
    """The next message; raises `ChildProcessError` where nobody is at the other end."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise ChildProcessError("A worker process has died; the machine may be short of memory.") from None


def answer_one(blocks: dict[int, BlockResult], questions: Connection, sums: Tensor, models: Tensor) -> None:
    """In the worker: take a question about one of its `blocks`; long answers go to the shared `sums` and `models`."""
    question, what, *details = questions.recv()
    block = blocks[question[0]]
    answer = None
    if what == "models":
        block.models(into=models[: len(block.report.steps)])
    elif what == "moved":
        slot, weights = details
        sums[slot] = block.moved(torch.tensor(weights, dtype=sums.dtype))
    else:
        slot, moved = details
        answer = block.squares(sums[slot] if moved else None).tolist()
    questions.send((question, answer))
