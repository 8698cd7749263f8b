"""A Flower grid in one process, which runs a client when its reply is pulled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from threading import RLock
from typing import Any
from weakref import finalize

import torch
from flwr.app import Context, Error, Message, UserConfig

from corymb.protocol.flower import (
    CLIENT_APP_RAISED,
    node_info,
    set_message_id,
    set_task_identity,
    unchecked_reply,
)
from corymb.simulations.cores import can_fork
from corymb.simulations.data.clients import Client, CohortTrainer, IndexedReplies
from corymb.simulations.data.population import client_names
from corymb.simulations.grid.bare_grid import BareGrid
from corymb.simulations.grid.client_pool import ClientPool, run_client
from corymb.simulations.grid.contexts import FIRST_NODE_ID, RUN_ID, Contexts
from corymb.simulations.grid.failures import Failures
from corymb.simulations.grid.waiting import WaitingMessages

log = logging.getLogger("flwr.corymb")
SERVER_ID = 1


class LocalGrid(BareGrid):
    """A grid that delivers messages to `client_app` on this machine, without Ray, sockets or serialisation.

    `nodes` is the number of nodes, or their names. Node `i` has `partition-id = i` and `num-partitions` in its node
    config, as in Flower's simulation, together with the entries of `node_config(i)`.

    A client runs when its reply is pulled, so a strategy that pulls one id at a time needs memory for one reply.
    Before a node runs a message, it runs those that were sent to it earlier; `finish` runs the rest. One client runs
    at a time, also for a strategy with several threads. An app that implements `CohortTrainer` trains all clients of a
    push in one call. With `workers` above 1, as many forked processes run the clients of any other app, except with a
    GPU or where processes cannot be forked. The number of workers does not change the results: what a client draws
    from the global random generators depends only on torch's seed when the grid was made, the node and the message.

    A Context keeps the changes of a client that replied, not those of one that raised an exception. Clients do not
    change the caller's random generators. `replies` is the number of replies; `failures` counts the exceptions of the
    app by their text. `close` ends the processes.
    """

    is_complete = True  # no node joins later, so a server need not wait for more

    def __init__(
        self,
        client_app: Client,
        nodes: int | Sequence[str],
        *,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], UserConfig] = lambda node: {},
        workers: int = 1,
        run_id: int = RUN_ID,
    ) -> None:
        names = client_names(nodes) if isinstance(nodes, int) else nodes
        if not names:
            raise ValueError("A grid of 0 nodes cannot run; give at least one node.")
        super().__init__(run_id)
        set_task_identity(run_id, SERVER_ID)
        self._app = client_app
        self._names = names
        self._nodes: list[Any] = []
        self._contexts = Contexts(len(names), run_config or {}, node_config, run_id)
        self._waiting = WaitingMessages()
        self._begun: dict[str, Message] = {}  # messages whose clients run together and have not replied yet
        self._answers: IndexedReplies = iter(())  # replies to the begun messages; an index refers to `_begun_ids`
        self._begun_ids: list[str] = []
        self._begun_contexts: list[Context] = []
        self._ready: dict[str, Message] = {}  # replies to begun messages that have not been pulled yet
        self._lock = RLock()
        self._seed = torch.initial_seed()
        self._cohort = client_app if isinstance(client_app, CohortTrainer) else None  # this check is slow
        self._pool: ClientPool | None = None
        if workers > 1 and can_fork() and self._cohort is None:
            self._pool = ClientPool(client_app, workers, self._seed)
            finalize(self, self._pool.close)
        self.replies, self.failures = 0, Failures()

    def server_context(self) -> Context:
        """Return a Context for a ServerApp."""
        return self._contexts.of_server(SERVER_ID)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return [FIRST_NODE_ID + row for row in range(len(self._names))]

    def get_nodes(self) -> list[Any]:
        """Return all nodes."""
        if not self._nodes:
            self._nodes = [node_info(FIRST_NODE_ID + row, name) for row, name in enumerate(self._names)]
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue `messages` and return their ids. A message to an unknown node is not sent, and gets no id."""
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if not 0 <= node_id - FIRST_NODE_ID < len(self._names):
                log.warning("Node %d does not exist in this grid of %d nodes.", node_id, len(self._names))
                continue
            ids.append(self._waiting.add(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the clients that `message_ids` were sent to and return their replies. Each reply is returned once."""
        with self._lock:
            return [reply for message_id in message_ids for reply in self._pull(message_id)]

    def finish(self) -> None:
        """Run the clients whose messages nobody has pulled, as a deployment does. Their replies are dropped."""
        with self._lock:
            while message_ids := list(self._waiting):
                self._start_together()
                while self._begun:
                    self._receive_next()
                for message_id in message_ids:
                    if message_id in self._waiting:
                        self._run_client(message_id)

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self._pool is not None:
            self._pool.close()

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """See `StreamingGrid`: clients that run one by one reply first, then those that train together."""
        wanted = [message_id for message_id in message_ids if message_id in self._waiting]
        self._start_together()
        together = {message_id for message_id in wanted if message_id in self._begun}
        try:
            for message_id in wanted:
                if message_id not in together:
                    with self._lock:
                        reply = self._run_client(message_id)
                    yield message_id, reply
                    del reply
            while together:
                message_id = self._receive_next()
                if message_id in together:
                    together.discard(message_id)
                    yield message_id, self._ready.pop(message_id)
        finally:  # drop the messages and replies that the caller no longer waits for
            for message_id in wanted:
                if message_id in self._waiting:
                    self._waiting.take(message_id)
                for queue in (self._begun, self._ready):
                    queue.pop(message_id, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages` and return the replies that are there after `timeout` seconds; None means all replies.

        A client that is running at the deadline runs to its end, but its reply is dropped, as are those of the clients
        that have not started.
        """
        deadline = inf if timeout is None else time.monotonic() + timeout
        replies = []
        for message_id in self.push_messages(messages):
            if time.monotonic() < deadline:
                arrived = self.pull_messages([message_id])
                replies += arrived if time.monotonic() < deadline else []
        return replies

    def require_replies(self) -> None:
        """Raise `ValueError` if clients ran and the app raised an exception at every one."""
        if self.failures and not self.replies:
            raise self.failures.error()

    def _pull(self, message_id: str) -> Iterator[Message]:
        if message_id in self._waiting and self._runs_together(message_id):
            self._start_together()
        while message_id in self._begun:
            self._receive_next()
        if message_id in self._ready:
            yield self._ready.pop(message_id)
        elif message_id in self._waiting:
            yield self._run_client(message_id)

    def _runs_together(self, message_id: str) -> bool:
        """Return whether the client of a waiting message can be run together with others."""
        if self._pool is not None:
            return self._waiting.oldest_at(message_id) == message_id
        return self._cohort is not None and self._waiting[message_id].metadata.message_type.startswith("train")

    def _start_together(self) -> None:
        """Start the clients of all waiting messages that can be run together."""
        ids = [message_id for message_id in self._waiting if self._runs_together(message_id)]
        if not ids:
            return
        while self._begun:  # replies to an earlier push, which a strategy may still pull
            self._receive_next()
        if self._pool is not None:
            self._pool.stop()
        for context in self._begun_contexts:  # some may belong to replies that nobody waited for
            self._contexts.keep(context)
        self._begun_ids = ids
        self._begun = {message_id: self._waiting.take(message_id) for message_id in ids}
        requests = [(message, self._contexts.of(message.metadata.dst_node_id)) for message in self._begun.values()]
        self._begun_contexts = [context for _, context in requests]
        if self._pool is not None:
            self._answers = self._pool.run(requests)
        elif self._cohort is not None:
            self._answers = self._cohort.train_together(requests)

    def _receive_next(self) -> str:
        """Wait for the next reply of the clients that train together; return the id of its message."""
        index, reply = next(self._answers)
        self._contexts.keep(self._begun_contexts[index])
        message_id = self._begun_ids[index]
        if message_id in self._begun:  # else the message was dropped
            self._ready[message_id] = self._finish(self._begun.pop(message_id), reply)
        return message_id

    def _run_client(self, message_id: str) -> Message:
        """Run the client of this message, after the earlier messages to the same node, and return its reply."""
        while self._begun and self._pool is not None:  # perhaps one of them goes to the same node
            self._receive_next()
        while (oldest := self._waiting.oldest_at(message_id)) != message_id:
            self._ready[oldest] = self._run_client(oldest)
        message = self._waiting.take(message_id)
        context = self._contexts.of(message.metadata.dst_node_id)
        reply = run_client(self._app, message, context, self._seed)
        self._contexts.keep(context)
        return self._finish(message, reply)

    def _finish(self, message: Message, reply: Message | Exception) -> Message:
        """Return `reply` with an id, or, for an exception of the app, the error reply that a node sends."""
        if not isinstance(reply, (Message, Exception)):
            reply = TypeError(f"The client app returned a {type(reply).__name__}; return a Message.")
        if isinstance(reply, Message):
            self.replies += 1
            set_message_id(reply, f"reply-{message.metadata.message_id}")
            return reply
        text = self.failures.add(reply, self._names[message.metadata.dst_node_id - FIRST_NODE_ID])
        return unchecked_reply(message, error=Error(CLIENT_APP_RAISED, text))
