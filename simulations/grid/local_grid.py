"""A federation in one process: a Flower grid that runs its clients when their replies are asked for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid

from corymb.protocol.flower import CLIENT_APP_RAISED, empty_run, inside_task, node_info, quick_reply, stamp
from corymb.simulations.data.clients import Answers, Client, TrainsTogether
from corymb.simulations.data.population import client_names

log = logging.getLogger("flwr.corymb")
RUN_ID = 1
SERVER_ID = 1
FIRST_NODE_ID = 1000


class LocalGrid(Grid):
    """Delivers messages to `client_app` in this process: no Ray, no sockets, nothing serialised.

    `nodes` is how many there are, or their names. Node `i` has `partition-id = i` and `num-partitions` in its node
    config, as in Flower's simulation, and a Context whose state lasts for the run; `node_config(i)` says what its
    node config has besides. A client runs when its reply is pulled, so a strategy that pulls one id at a time holds
    one reply at a time. An app that `TrainsTogether` trains all clients of a push in one call.
    """

    is_complete = True  # nobody joins later, so nobody need be waited for

    def __init__(
        self,
        client_app: Client,
        nodes: int | Sequence[str],
        *,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], UserConfig] = lambda node: {},
    ) -> None:
        names = client_names(nodes) if isinstance(nodes, int) else nodes
        if not names:
            raise ValueError("A federation of 0 nodes cannot run; give at least one.")
        inside_task(RUN_ID, SERVER_ID)
        self._app = client_app
        self._names = names
        self._nodes: list[Any] = []
        self._run_config: UserConfig = dict(run_config or {})
        self._node_config = node_config
        self._contexts: dict[int, Context] = {}
        self._waiting: dict[str, Message] = {}  # no client has begun with these
        self._begun: dict[str, Message] = {}  # those whose clients train together
        self._answers: Answers = iter(())  # of these, by their numbers in `_ids`
        self._ids: list[str] = []
        self._ready: dict[str, Message] = {}  # their replies that nobody has pulled yet
        self._numbers = count(1)
        self._run = empty_run(RUN_ID)
        self.answered = 0  # messages
        self.failures: Counter[str] = Counter()  # exceptions of the app; each is logged once

    def set_run(self, run: Any) -> None:
        """Take `run` as this grid's."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run, as Flower describes one."""
        return self._run

    def server_context(self) -> Context:
        """The Context that a ServerApp gets."""
        return Context(RUN_ID, SERVER_ID, {}, RecordDict(), dict(self._run_config))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; Flower deprecates this in favour of the constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of all nodes."""
        return [FIRST_NODE_ID + row for row in range(len(self._names))]

    def get_nodes(self) -> list[Any]:
        """All nodes."""
        if not self._nodes:
            self._nodes = [node_info(FIRST_NODE_ID + row, name) for row, name in enumerate(self._names)]
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue `messages` and return their ids."""
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if not 0 <= node_id - FIRST_NODE_ID < len(self._names):
                raise ValueError(f"Node {node_id} is not in this grid of {len(self._names)} nodes.")
            message_id = f"message-{next(self._numbers)}"
            stamp(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the clients that `message_ids` were sent to; their replies. Each is given out once."""
        return [reply for message_id in message_ids for reply in self._pulled(message_id)]

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """See `StreamingGrid`: clients that train by themselves come first, then the others as they finish."""
        wanted = [message_id for message_id in message_ids if message_id in self._waiting]
        self._begin_together()
        together = {message_id for message_id in wanted if message_id in self._begun}
        try:
            for message_id in wanted:
                if message_id not in together:
                    yield message_id, self._answer(self._waiting.pop(message_id))
            while together:
                message_id = self._next_begun()
                if message_id in together:
                    together.discard(message_id)
                    yield message_id, self._ready.pop(message_id)
        finally:  # who is not waited for any more is not answered
            for message_id in wanted:
                for kept in (self._waiting, self._begun, self._ready):
                    kept.pop(message_id, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages` and pull all replies; a client in process is never late."""
        return self.pull_messages(self.push_messages(messages))

    def require_answers(self) -> None:
        """Raise `ValueError` when clients were asked and the app raised at every one."""
        if self.failures and not self.answered:
            reason, times = self.failures.most_common(1)[0]
            raise ValueError(f"Every client failed, {times} times with: {' '.join(reason.split())}")

    def _pulled(self, message_id: str) -> Iterator[Message]:
        if message_id in self._waiting and self._trains(message_id):
            self._begin_together()
        while message_id in self._begun:
            self._next_begun()
        if message_id in self._ready:
            yield self._ready.pop(message_id)
        elif message_id in self._waiting:
            yield self._answer(self._waiting.pop(message_id))

    def _trains(self, message_id: str) -> bool:
        return self._waiting[message_id].metadata.message_type.startswith("train")

    def _begin_together(self) -> None:
        """Have an app that can do so train all who wait."""
        ids = [message_id for message_id in self._waiting if self._trains(message_id)]
        if not ids or not isinstance(self._app, TrainsTogether):
            return
        while self._begun:  # of an earlier push; a strategy may still ask for them
            self._next_begun()
        self._ids = ids
        self._begun = {message_id: self._waiting.pop(message_id) for message_id in ids}
        self._answers = self._app.train_together(
            [(message, self._context(message.metadata.dst_node_id)) for message in self._begun.values()]
        )

    def _next_begun(self) -> str:
        """Wait for one more reply of those that are trained together; the id that it answers."""
        number, reply = next(self._answers)
        message_id = self._ids[number]
        if message_id in self._begun:  # else nobody waits for it any more
            self._ready[message_id] = self._checked(self._begun.pop(message_id), reply)
        return message_id

    def _answer(self, message: Message) -> Message:
        context = self._context(message.metadata.dst_node_id)
        reply: Message | Exception
        try:
            reply = self._app(_delivered(message), context)
        except Exception as error:
            reply = error
        if context.state:
            self._contexts[context.node_id] = context
        return self._checked(message, reply)

    def _checked(self, message: Message, reply: Message | Exception) -> Message:
        """A client's `reply`, or the error reply that a node sends when its app has raised."""
        if not isinstance(reply, (Message, Exception)):
            reply = TypeError(f"The client app returned a {type(reply).__name__}, not a Message.")
        if isinstance(reply, Message):
            self.answered += 1
            stamp(reply, f"reply-{message.metadata.message_id}")
            return reply
        reason = f"{type(reply).__name__}: {reply}"
        if reason not in self.failures:
            name = self._names[message.metadata.dst_node_id - FIRST_NODE_ID]
            log.warning("The client app raised at %s", name, exc_info=reply)
        self.failures[reason] += 1
        return quick_reply(message, error=Error(CLIENT_APP_RAISED, reason))

    def _context(self, node_id: int) -> Context:
        """The node's Context: the one that holds its state, or a new one. 100,000 that hold nothing are not kept."""
        if node_id in self._contexts:
            return self._contexts[node_id]
        row = node_id - FIRST_NODE_ID
        config = {"partition-id": row, "num-partitions": len(self._names), **self._node_config(row)}
        return Context(RUN_ID, node_id, config, RecordDict(), self._run_config.copy())


def _delivered(message: Message) -> Message:
    """`message` as its receiver's own: many share one content, and an app may take records apart."""
    content = message.content.copy()
    for name, record in content.items():
        content[name] = record.copy()
    delivered: Message = Message(content=content, metadata=message.metadata)  # type: ignore[call-overload]  # as grids do
    return delivered
