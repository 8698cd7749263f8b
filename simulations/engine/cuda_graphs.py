"""Work on a GPU that is recorded as a CUDA graph: small kernels take longer to launch one by one than to run."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

log = logging.getLogger("flwr.corymb")
RECORDING = Lock()  # torch can make one recording at a time, of whatever device
MOST = 8  # recordings that are kept, each with memory for a block of clients
REMEMBERED = 64  # kinds of work that came once
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
        # Other threads may be busy with other devices meanwhile.
        how: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with RECORDING, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            # The stream in use comes back even after a recording that broke off, which leaves its own behind.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **how):
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
    `replayed` counts the times from recordings.
    """

    has_failed: ClassVar[bool] = False  # once, anywhere: torch is not sound for another recording after one broke off

    def __init__(self, record: Record) -> None:
        self._record = record
        self._once: OrderedDict[Hashable, None] = OrderedDict()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self.replayed = 0

    def run(self, kind: Hashable, work: Work, inputs: Sequence[Tensor]) -> Any:
        """`work(*inputs)`, of which all of a `kind` do the same on tensors of the same shapes."""
        if kind in self._recordings:
            self._recordings.move_to_end(kind)
            self.replayed += 1
            return self._recordings[kind](inputs)
        result = work(*inputs)
        if kind in self._once and not Recorder.has_failed:
            del self._once[kind]
            self._make(kind, work, inputs)
        else:
            self._once[kind] = None
            if len(self._once) > REMEMBERED:
                self._once.popitem(last=False)
        return result

    def _make(self, kind: Hashable, work: Work, inputs: Sequence[Tensor]) -> None:
        try:
            self._recordings[kind] = _Recording(self._record, work, inputs)
        except Exception as error:
            Recorder.has_failed = True
            reason = error.__context__ or error  # the first is what went wrong, before the recording was closed
            log.warning("No more CUDA graphs are recorded, as one could not be: %s", reason)
        if len(self._recordings) > MOST:  # never the last one: their memory would have to be made anew
            self._recordings.popitem(last=False)
