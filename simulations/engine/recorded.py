"""Work on a GPU that is recorded as a CUDA graph: small kernels take longer to launch one by one than to run."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from threading import Lock
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("flwr.corymb")
RECORDING = Lock()  # torch can make one recording at a time, of whatever device
MOST = 16  # kinds of work that are remembered, recorded or not
Replay = Callable[[], None]
Work = Callable[..., Any]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]  # work without inputs; how to do it again, and its result


class CudaGraphs:
    """Records what work has one device do.

    Recordings share memory for what they work out in between, as they run one at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # torch's own for this would be one for all devices
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        """See `Record`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may be busy with other devices meanwhile.
        how: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with RECORDING, torch.cuda.device(self._device), torch.cuda.graph(graph, **how):
            result = work()
        return graph.replay, result


class _Recording:
    """One kind of work, with memory for its inputs and its result."""

    def __init__(self, record: Record, work: Work, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._replay, self._result = record(lambda: work(*self._inputs))

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for mine, tensor in zip(self._inputs, inputs, strict=True):
            mine.copy_(tensor)
        self._replay()
        return deepcopy(self._result)  # whose memory the next time needs


class Recorder:
    """Does work that follows from its inputs alone: the first two times directly, from then on by a recording.

    The second time shows that it comes again, and that this thread has all that it needs, so it is recorded then.
    """

    def __init__(self, record: Record) -> None:
        self._record: Record | None = record
        self._kinds: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def run(self, kind: Hashable, work: Work, inputs: Sequence[Tensor]) -> Any:
        """`work(*inputs)`, of which all of a `kind` do the same on tensors of the same shapes."""
        if recording := self._kinds.get(kind):
            self._kinds.move_to_end(kind)
            return recording(inputs)
        result = work(*inputs)
        if self._record is not None:
            try:
                self._kinds[kind] = _Recording(self._record, work, inputs) if kind in self._kinds else None
            except Exception as error:
                log.warning("Training goes on without CUDA graphs, as recording one failed: %s", error)
                self._record = None
            if len(self._kinds) > MOST:
                self._kinds.popitem(last=False)
        return result
