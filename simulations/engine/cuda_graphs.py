"""Run repeated work on a GPU as a CUDA graph: small kernels take longer to launch one by one than to run."""

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
CAPTURE_LOCK = Lock()  # torch can capture one graph at a time, over all devices
MAX_GRAPHS = 8  # graphs that are kept; each holds memory for a block of clients
MAX_SEEN = 64  # kinds of work that were seen once and are remembered
Replay = Callable[[], None]
Work = Callable[..., Any]
Capture = Callable[[Callable[[], Any]], tuple[Replay, Any]]  # from work without inputs to its replay and its result


class CudaCapture:
    """Captures work on one device as CUDA graphs.

    The graphs share one pool for their intermediate results, because they run one at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # torch's default capture stream is shared by all devices
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        """See `Capture`."""
        # "thread_local": other threads may use other devices meanwhile.
        options: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with CAPTURE_LOCK, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            # A failed capture leaves its own stream current, so the outer context restores the present one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **options):
                result = work()
        return graph.replay, result


class _Graph:
    """A captured graph for one kind of work, with the memory for its inputs and its result."""

    def __init__(self, capture: Capture, work: Work, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._replay, self._result = capture(lambda: work(*self._inputs))

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        for target, tensor in zip(self._inputs, inputs, strict=True):
            target.copy_(tensor)
        self._replay()
        return deepcopy(self._result)  # the next call overwrites its memory


class GraphRunner:
    """Runs work that depends on its inputs alone: directly the first two times, and from a graph after that.

    The graph is captured the second time. By then it is clear that the work repeats, and this thread has set up all
    that the work needs. `replayed` counts the runs from graphs.
    """

    has_failed: ClassVar[bool] = False  # in the whole process: torch cannot capture safely after a failure

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self.replayed = 0

    def run(self, kind: Hashable, work: Work, inputs: Sequence[Tensor]) -> Any:
        """Return `work(*inputs)`; all work of a `kind` must run the same operations on tensors of the same shapes."""
        if kind in self._graphs:
            self._graphs.move_to_end(kind)
            self.replayed += 1
            return self._graphs[kind](inputs)
        result = work(*inputs)
        if kind in self._seen and not GraphRunner.has_failed:
            del self._seen[kind]
            self._add_graph(kind, work, inputs)
        else:
            self._seen[kind] = None
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
        return result

    def _add_graph(self, kind: Hashable, work: Work, inputs: Sequence[Tensor]) -> None:
        try:
            self._graphs[kind] = _Graph(self._capture, work, inputs)
        except Exception as error:
            GraphRunner.has_failed = True
            # The context is the original error; `error` itself may come from ending the capture.
            reason = error.__context__ or error
            log.warning("CUDA graphs are disabled because a capture failed: %s", reason)
        if len(self._graphs) > MAX_GRAPHS:  # one graph always remains, so that the shared pool is not freed
            self._graphs.popitem(last=False)
