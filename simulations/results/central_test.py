"""The test of the server's model on the central test set, on all cores."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from queue import SimpleQueue

from torch import nn
from torch.utils.data import TensorDataset

from corymb.client.batches import evaluation_batches
from corymb.client.tasks.tally import Tally
from corymb.client.tasks.task import CLASSIFICATION, Task
from corymb.client.trainer import tested
from corymb.simulations.data.examples import Examples
from corymb.strategies.core.threads import pool

PART = 1024  # examples that a thread tests at a time


class CentralTest:
    """Tests `module` on `examples` in parts of 1024, in `threads` threads. Their number does not change the result."""

    def __init__(self, module: nn.Module, examples: Examples, threads: int, task: Task = CLASSIFICATION) -> None:
        self._task = task
        spans = [slice(start, start + PART) for start in range(0, len(examples), PART)]
        self._parts = [TensorDataset(examples.inputs_at(span), examples.targets[span]) for span in spans]
        self._threads = min(threads, len(self._parts))
        # A thread has a module of its own, which may keep notes in `forward`, with the same parameters and buffers.
        shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
        self._modules: SimpleQueue[nn.Module] = SimpleQueue()
        self._modules.put(module)
        for _ in range(self._threads - 1):
            self._modules.put(deepcopy(module, dict(shared)))

    def metrics(self) -> dict[str, float]:
        """Return the mean loss and the task's metrics of the module's present parameters."""
        if self._threads > 1:
            found = list(pool(self._threads).map(self._test, self._parts))
        else:
            found = list(map(self._test, self._parts))
        total = Tally(self._task, keeps_outputs=True)
        total.add_all(found)
        return total.metrics()

    def _test(self, part: TensorDataset) -> Tally:
        module = self._modules.get()
        try:
            return tested(module, evaluation_batches(part), None, self._task)
        finally:
            self._modules.put(module)
