"""Where blocks of clients are trained in this process: one after another, or on several devices at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from corymb.client import TrainSettings
from corymb.client.device import choose_device
from corymb.simulations.engine.block_result import BlockResult, Report
from corymb.simulations.engine.blocks import Task, TrainedBlock
from corymb.simulations.engine.optimizer import ELEMENTWISE
from corymb.strategies import Layout
from corymb.strategies.core.rows import Matrix, Rows

Answered = tuple[Task, Rows | Exception, Report | None]


class Trainer(Protocol):
    """Trains one block on a `device`; what it tells of it is on the CPU."""

    device: torch.device

    def train(
        self,
        start: dict[str, Tensor],
        clients: Sequence[int],
        settings: TrainSettings,
        server_round: int,
        own: bool = False,
    ) -> BlockResult:
        """See `Program.train`."""


class Engine(Protocol):
    """Trains blocks of clients on a `device`."""

    device: torch.device

    def train(self, tasks: Sequence[Task], start: Tensor) -> Iterator[Answered]:
        """Train the clients of all `tasks` from `start [P]`: begins at once, and gives each block when it is there."""

    def train_own(self, task: Task, starts: Tensor) -> Answered:
        """Train clients that begin from models of their own, `starts [K, P]`."""

    def close(self) -> None:
        """End what it started."""


def obstacle(settings: TrainSettings, device: torch.device) -> str | None:
    """What keeps a block from being trained so on `device`, if anything does: a client has to do that by itself. So it
    is with bfloat16 on a CPU, where it is slower than float32.
    """
    if settings.batch_updates or settings.report_classes:
        return "the rule wants more of a client than its model"
    if settings.precision not in (("float32",) if device.type == "cpu" else ("float32", "bfloat16")):
        return f"precision = {settings.precision!r} is not for blocks on {device.type!r}"
    if settings.optimizer not in ELEMENTWISE:
        return f"{settings.optimizer} does not treat every number by itself"
    if choose_device(settings.device).type != device.type:
        return f"they want device = {settings.device!r} and the engine has {device.type!r}"
    return None


class InProcess:
    """Trains one block after another, each when it is asked for."""

    def __init__(self, trainer: Trainer, layout: Layout) -> None:
        self._trainer, self._layout, self.device = trainer, layout, trainer.device

    def train(self, tasks: Sequence[Task], start: Tensor) -> Iterator[Answered]:
        """See `Engine.train`."""
        state = self._layout.split(start)
        for task in tasks:
            try:
                trained = self._trainer.train(state, task.clients, task.settings, task.server_round)
            except Exception as error:
                yield task, error, None
            else:
                yield task, TrainedBlock(trained, start, self._layout), trained.report
                del trained

    def train_own(self, task: Task, starts: Tensor) -> Answered:
        """See `Engine.train_own`."""
        try:
            trained = self._trainer.train(
                self._layout.split(starts), task.clients, task.settings, task.server_round, own=True
            )
        except Exception as error:
            return task, error, None
        return task, Matrix(trained.models()), trained.report

    def close(self) -> None:
        """Nothing was started."""


class OnDevices:
    """Trains as many blocks at a time as there are devices, in a thread for each.

    Which of them trains a block has no effect on any result, as long as they are alike.
    """

    def __init__(self, trainers: Sequence[Trainer], layout: Layout) -> None:
        self._free: SimpleQueue[InProcess] = SimpleQueue()
        for trainer in trainers:
            self._free.put(InProcess(trainer, layout))
        self.device = trainers[0].device
        self._ahead = 2 * len(trainers)  # blocks, so that no device waits for who reads them
        self._threads = ThreadPoolExecutor(len(trainers))
        self._coming: deque[Future[Answered]] = deque()

    def train(self, tasks: Sequence[Task], start: Tensor) -> Iterator[Answered]:
        """See `Engine.train`; it ends what is left of the call before."""
        for left in self._coming:
            left.cancel()
        waiting = iter(tasks)
        self._coming = deque(self._threads.submit(self._train, task, start) for task in islice(waiting, self._ahead))
        return self._answers(self._coming, waiting, start)

    def _answers(self, coming: deque[Future[Answered]], waiting: Iterator[Task], start: Tensor) -> Iterator[Answered]:
        """The blocks in the order of their tasks."""
        while coming:
            answered = coming.popleft().result()
            coming.extend(self._threads.submit(self._train, task, start) for task in islice(waiting, 1))
            yield answered
            del answered  # its memory goes to the next

    def train_own(self, task: Task, starts: Tensor) -> Answered:
        """See `Engine.train_own`."""
        with self._one() as engine:
            return engine.train_own(task, starts)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _train(self, task: Task, start: Tensor) -> Answered:
        with self._one() as engine:
            return next(engine.train([task], start))

    @contextmanager
    def _one(self) -> Iterator[InProcess]:
        """One of the devices, for as long as it is needed."""
        engine = self._free.get()
        try:
            yield engine
        finally:
            self._free.put(engine)
