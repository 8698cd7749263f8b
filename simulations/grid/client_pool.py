"""Forked worker processes that run the clients of any ClientApp, one client each at a time."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict

from corymb.protocol.records import copied_message, copied_records
from corymb.simulations.data.clients import Client, IndexedReplies, Request
from corymb.simulations.grid.failures import RemoteError
from corymb.strategies.core.random_state import seeded_generators


def run_client(app: Client, message: Message, context: Context, seed: int) -> Message | Exception:
    """Return the reply of `app` to a copy of `message`, or the exception that it raised.

    `context.state` keeps the changes of a client that replied. The global random generators are seeded with `seed`,
    the node and the message, and restored afterwards; so a client's draws do not depend on what ran before it.
    """
    before = copied_records(context.state)
    try:
        with seeded_generators(seed, context.node_id, message.metadata.message_id):
            return app(copied_message(message), context)
    except Exception as error:
        context.state = before
        return error


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    index: int | None = None  # of the request that it runs


class ClientPool:
    """Runs the clients of `app` in `processes`, forked from this one at the first message, with one thread each.

    The results do not depend on the number of processes. A worker that dies costs the reply of its client, and another
    takes its place.
    """

    def __init__(self, app: Client, processes: int, seed: int) -> None:
        self._app, self._size, self._seed = app, processes, seed
        self._workers: list[_Worker] = []
        self._running = self._replies(())

    def run(self, requests: Sequence[Request]) -> IndexedReplies:
        """Yield (index of the request, reply or exception) in order of completion; updates the requests' Contexts.

        Ends the call before, as `stop` does.
        """
        self.stop()
        self._running = self._replies(requests)
        return self._running

    def stop(self) -> None:
        """End the running call: clients that have not started do not start, and replies of the others are dropped."""
        self._running.close()

    def _replies(self, requests: Sequence[Request]) -> Generator[tuple[int, Message | Exception]]:
        waiting = deque(range(len(requests)))
        while len(self._workers) < min(self._size, len(requests)):
            self._workers.append(self._fork())
        try:
            for worker in self._workers:
                self._send_next(worker, waiting, requests)
            while busy := [worker for worker in self._workers if worker.index is not None]:
                for pipe in wait([worker.pipe for worker in busy]):
                    worker = next(worker for worker in busy if worker.pipe is pipe)
                    index, reply = self._receive(worker, requests)
                    if not worker.process.is_alive():
                        self._workers[self._workers.index(worker)] = worker = self._fork()
                    self._send_next(worker, waiting, requests)
                    yield index, reply
                    del reply  # free its model before the next one is read
        finally:
            for worker in self._workers:
                if worker.index is not None:
                    self._receive(worker, requests)

    def close(self) -> None:
        """End the worker processes."""
        self.stop()
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def _fork(self) -> _Worker:
        context: Any = multiprocessing.get_context("fork")
        pipe, worker_pipe = context.Pipe()
        others = [pipe, *(worker.pipe for worker in self._workers)]
        process = context.Process(target=_work, args=(worker_pipe, self._app, self._seed, others), daemon=True)
        process.start()
        worker_pipe.close()
        return _Worker(process, pipe)

    def _send_next(self, worker: _Worker, waiting: deque[int], requests: Sequence[Request]) -> None:
        if not waiting:
            return
        worker.index = waiting.popleft()
        with suppress(BrokenPipeError, ConnectionResetError):  # the worker has died, which `_receive` finds
            worker.pipe.send(requests[worker.index])

    def _receive(self, worker: _Worker, requests: Sequence[Request]) -> tuple[int, Message | Exception]:
        """Wait for the worker's reply; return the index of its request, and the reply or exception."""
        index, worker.index = worker.index, None
        assert index is not None
        try:
            reply, requests[index][1].state = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            reply = ChildProcessError(f"The process of the client ended with exit code {worker.process.exitcode}.")
        return index, reply


def _work(pipe: Connection, app: Client, seed: int, others: list[Connection]) -> None:
    """Run the clients that come through `pipe`, until the other end closes it. `others` are the server's ends."""
    for other in others:  # inherited by the fork; while they are open here, the server's end never closes
        other.close()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionResetError, KeyboardInterrupt):
        while True:
            message, context = pipe.recv()
            reply = run_client(app, message, context, seed)
            if isinstance(reply, Exception):
                reply = RemoteError.of(reply)
            try:
                pipe.send((reply, context.state))
            except Exception as error:
                pipe.send((RemoteError.of(error), RecordDict()))
