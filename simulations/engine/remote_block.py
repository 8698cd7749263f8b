"""Blocks of clients in the memory of a worker process, and the queries that the server process sends to it.

Queries and short results go through a pipe. Whole models are written to memory that both processes share. The
server process does not wait after it sends a query. It receives results when it needs one of them.
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
from corymb.simulations.engine.blocks import ClientBlock, Targets, copy_rows, offset_of, relative_to_origin
from corymb.strategies import Layout

SLOTS = 4  # vectors that a worker may have computed and the server process has not yet read
Query = tuple[int, int]  # the number of the block, and of the query among those to the block


@dataclass
class Worker:
    """The server process's view of a worker process."""

    process: Any
    tasks: Connection
    queries: Connection  # about trained blocks; the worker handles them before it starts another task
    vectors: Tensor  # shared [SLOTS, P]
    models: Tensor  # shared [max_clients, P], for the models of one block at a time
    unfinished: int = 0  # tasks that were sent and not yet reported
    free: list[int] = field(default_factory=lambda: list(range(SLOTS)))  # free rows of `vectors`
    is_writing: bool = False  # whether the worker may be writing to `models`
    # For each query without a result yet, the function to convert the result.
    pending: dict[Query, Callable[[Any], Any]] = field(default_factory=dict)
    results: dict[Query, Any] = field(default_factory=dict)  # received and not yet read
    released: list[int] = field(default_factory=list)  # blocks the worker may delete; sent along with the next task


class RemoteBlock(ClientBlock):
    """A block in the memory of a worker process. The worker deletes it some time after this object is deleted."""

    def __init__(self, worker: Worker, number: int, clients: int, start: Tensor, layout: Layout) -> None:
        super().__init__(clients, layout)
        self._worker, self._number, self._start = worker, number, start
        self._query_numbers = count()
        weakref.finalize(self, _release, worker, number)

    def add_to(self, total: Tensor, weights: Tensor, origin: Tensor) -> Callable[[], None]:
        """See `Rows`; the worker computes the sum while this process goes on."""
        worker, slot, start = self._worker, self._free_slot(), self._start

        def receive(_: Any) -> Tensor:
            worker.free.append(slot)
            return worker.vectors[slot].clone()

        update = self._send_query(receive, "weighted_update", slot, weights.tolist())

        def finish() -> None:
            total.add_(relative_to_origin(update(), weights, start, origin))

        return finish

    def squared_distances(self, centre: Tensor) -> Callable[[], Tensor]:
        """See `Rows`."""
        offset = offset_of(centre, self._start)
        worker, slot = self._worker, self._free_slot()
        if offset is not None:
            worker.vectors[slot] = offset

        def receive(squares: list[float]) -> Tensor:
            worker.free.append(slot)
            return torch.tensor(squares, dtype=torch.float64)

        return self._send_query(receive, "squared_distances", slot, offset is not None)

    def _copy_to(self, targets: Targets) -> Callable[[], None]:
        worker = self._worker
        while worker.is_writing:
            receive_result(worker)
        worker.is_writing = True

        def receive(_: Any) -> None:
            worker.is_writing = False
            copy_rows(worker.models, targets)

        return self._send_query(receive, "models")

    def _free_slot(self) -> int:
        while not self._worker.free:
            receive_result(self._worker)
        return self._worker.free.pop()

    def _send_query(self, receive: Callable[[Any], Any], *details: Any) -> Callable[[], Any]:
        worker, query = self._worker, (self._number, next(self._query_numbers))
        worker.pending[query] = receive
        send(worker.queries, (query, *details))
        return lambda: _result_of(worker, query)


def _result_of(worker: Worker, query: Query) -> Any:
    while query not in worker.results:
        if query not in worker.pending:
            raise RuntimeError(
                "A sum, distance or model of a block was requested in one round and read in the next; "
                "read it in the same round."
            )
        receive_result(worker)
    return worker.results.pop(query)


def receive_result(worker: Worker) -> None:
    """Receive the result of one query from a worker, and copy it out of the shared memory."""
    query, result = received(worker.queries)
    worker.results[query] = worker.pending.pop(query)(result)


def _release(worker: Worker, number: int) -> None:
    worker.released.append(number)


def send(pipe: Connection, message: Any) -> None:
    """Send `message`. Raises `ChildProcessError` if the process at the other end has died."""
    try:
        pipe.send(message)
    except OSError:
        raise ChildProcessError("A worker process has died; the machine may be short of memory.") from None


def received(pipe: Connection) -> Any:
    """Return the next message. Raises `ChildProcessError` if the process at the other end has died."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise ChildProcessError("A worker process has died; the machine may be short of memory.") from None


def handle_query(blocks: dict[int, BlockResult], queries: Connection, vectors: Tensor, models: Tensor) -> None:
    """Receive and handle one query in the worker process; `blocks` are its blocks by number.

    Large results go to the shared `vectors` or `models`, short ones through the pipe.
    """
    query, kind, *details = queries.recv()
    block = blocks[query[0]]
    result = None
    if kind == "models":
        block.models(into=models[: len(block.report.steps)])
    elif kind == "weighted_update":
        slot, weights = details
        vectors[slot] = block.weighted_update(torch.tensor(weights, dtype=vectors.dtype))
    else:
        slot, has_offset = details
        result = block.squared_distances(vectors[slot] if has_offset else None).tolist()
    queries.send((query, result))
