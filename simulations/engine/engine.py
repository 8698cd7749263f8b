"""The `Engine` protocol, and the engines that train blocks of clients in this process, on one or several devices."""

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
from corymb.client.local_work import algorithm_of
from corymb.simulations.engine.block_result import Report
from corymb.simulations.engine.blocks import MatrixBlock, Task, TrainedBlock, Trainer
from corymb.simulations.engine.optimizer import ELEMENTWISE
from corymb.strategies import Layout
from corymb.strategies.core.rows import Rows

Outcome = tuple[Task, Rows | Exception, Report | None]  # a trained block and its report, or the error and None


class Engine(Protocol):
    """Trains blocks of clients on a `device`."""

    device: torch.device

    def train(self, tasks: Sequence[Task], start: Tensor, second: Tensor | None = None) -> Iterator[Outcome]:
        """Train the clients of all `tasks` from `start [P]`, or their own starts; yield each block in the tasks' order.

        `second [P]` is the second vector that the rule sends, if it sends one.

        An engine with threads or processes begins at once, not with the first item.
        """

    def close(self) -> None:
        """End all threads and processes of the engine."""


def obstacle(settings: TrainSettings, device: torch.device) -> str | None:
    """Return the reason why clients with these settings cannot train in blocks on `device`, or None.

    bfloat16 on a CPU is an obstacle because it is slower than float32 there.
    """
    if not algorithm_of(settings).trains_in_blocks:
        return f"the client algorithm {settings.algorithm!r} does more than blocks support"
    if algorithm_of(settings).pulls and settings.personal:
        return f"blocks pull all layers, and {settings.algorithm!r} only those that are not personal"
    if settings.augment:
        return "blocks do not augment inputs"
    if settings.compression is not None:
        return "blocks do not compress updates"
    if settings.batch_updates or settings.report_classes:
        return "blocks do not support batch_updates and report_classes"
    if settings.precision not in (("float32",) if device.type == "cpu" else ("float32", "bfloat16")):
        return f"blocks on {device.type!r} do not support precision = {settings.precision!r}"
    if settings.optimizer not in ELEMENTWISE:
        return f"the optimizer {settings.optimizer!r} does not update every parameter value independently"
    if choose_device(settings.device).type != device.type:
        return f"the clients' device is {settings.device!r} and the engine's device is {device.type!r}"
    return None


class InProcessEngine:
    """Trains one block after another in this process, each when the caller takes it from the iterator."""

    def __init__(self, trainer: Trainer, layout: Layout) -> None:
        self._trainer, self._layout, self.device = trainer, layout, trainer.device

    def train(self, tasks: Sequence[Task], start: Tensor, second: Tensor | None = None) -> Iterator[Outcome]:
        """See `Engine.train`."""
        state = self._layout.split(start)
        for task in tasks:
            try:
                result = task.train(self._trainer, self._layout, state, second)
                own = MatrixBlock(result.models(), self._layout) if task.has_own_starts else None
            except Exception as error:
                yield task, error, None
            else:
                yield task, own or TrainedBlock(result, start, self._layout), result.report
                del result, own

    def close(self) -> None:
        """Do nothing: there are no threads or processes to end."""


class MultiDeviceEngine:
    """Trains one block per device at a time, each in a thread.

    The results do not depend on which device trains a block, as long as the devices are alike.
    """

    def __init__(self, trainers: Sequence[Trainer], layout: Layout) -> None:
        self._idle: SimpleQueue[InProcessEngine] = SimpleQueue()
        for trainer in trainers:
            self._idle.put(InProcessEngine(trainer, layout))
        self.device = trainers[0].device
        self._max_submitted = 2 * len(trainers)  # blocks, so that no device waits until the caller takes a block
        self._threads = ThreadPoolExecutor(len(trainers))
        self._submitted: deque[Future[Outcome]] = deque()

    def train(self, tasks: Sequence[Task], start: Tensor, second: Tensor | None = None) -> Iterator[Outcome]:
        """See `Engine.train`; cancels the blocks that remain from the previous call."""
        for future in self._submitted:
            future.cancel()
        waiting = iter(tasks)
        self._submitted = deque(
            self._threads.submit(self._train, task, start, second) for task in islice(waiting, self._max_submitted)
        )
        return self._outcomes(self._submitted, waiting, start, second)

    def _outcomes(
        self, submitted: deque[Future[Outcome]], waiting: Iterator[Task], start: Tensor, second: Tensor | None
    ) -> Iterator[Outcome]:
        while submitted:
            outcome = submitted.popleft().result()
            submitted.extend(self._threads.submit(self._train, task, start, second) for task in islice(waiting, 1))
            yield outcome
            del outcome  # frees its memory for the next block

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _train(self, task: Task, start: Tensor, second: Tensor | None) -> Outcome:
        with self._idle_engine() as engine:
            return next(engine.train([task], start, second))

    @contextmanager
    def _idle_engine(self) -> Iterator[InProcessEngine]:
        """Reserve the engine of an idle device; waits until there is one."""
        engine = self._idle.get()
        try:
            yield engine
        finally:
            self._idle.put(engine)
