"""A federation in one process: a Flower grid that runs its clients when their replies are asked for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid

from corymb.protocol.flower import (
    CLIENT_APP_RAISED,
    NODE_UNAVAILABLE,
    empty_run,
    inside_task,
    node_info,
    stamp,
)
from corymb.simulations.participation import Always, Participation

log = logging.getLogger("flwr.corymb")
RUN_ID = 1
SERVER_ID = 1
FIRST_NODE_ID = 1000


class LocalGrid(Grid):
    """Delivers messages to `client_app` in this process: no Ray, no sockets, nothing serialised.

    `nodes` is how many there are, or their names. Node `i` has `partition-id = i` and
    `num-partitions` in its node config, as in Flower's simulation, and a Context whose state lasts
    for the run. A client runs when its reply is pulled, so a strategy that pulls one id at a time
    holds one reply at a time.

    `node_configs` adds to the node config of each. An app with a method `together(pairs of message and context)`
    trains all clients of a push in one call.

    `participation` says who is online; it moves one step with each push that trains. A node that is
    offline answers with the error that a SuperLink gives for it.
    """

    complete = True  # nobody joins later, so nobody need be waited for

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        nodes: int | Sequence[str],
        *,
        run_config: Mapping[str, Any] | None = None,
        participation: Participation | None = None,
        node_configs: Sequence[UserConfig] | None = None,
    ) -> None:
        names = client_names(nodes) if isinstance(nodes, int) else nodes
        if not names:
            raise ValueError("A federation of 0 nodes cannot run; give at least one.")
        inside_task(RUN_ID, SERVER_ID)
        self._app = client_app
        self._nodes = [node_info(FIRST_NODE_ID + i, name) for i, name in enumerate(names)]
        self._ids = [node.node_id for node in self._nodes]
        self._run_config: UserConfig = dict(run_config or {})
        self._node_configs = node_configs or [{}] * len(names)
        self._participation = participation or Always(len(names))
        self._online = self._participation.step()
        self._rounds = 0
        self._contexts: dict[int, Context] = {}
        self._waiting: dict[str, Message] = {}
        self._trained: dict[str, Message] = {}  # by an app that trains all clients of a push at once
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
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message; Flower deprecates this in favour of the constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The ids of all nodes, online or not."""
        return list(self._ids)

    def get_nodes(self) -> list[Any]:
        """All nodes, online or not."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue `messages` and return their ids. A push that trains begins a round of participation."""
        ids = []
        trains = False
        for message in messages:
            row = message.metadata.dst_node_id - FIRST_NODE_ID
            if not 0 <= row < len(self._ids):
                raise ValueError(f"Node {message.metadata.dst_node_id} is not in this grid of {len(self._ids)} nodes.")
            message_id = f"message-{next(self._numbers)}"
            stamp(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
            trains = trains or message.metadata.message_type.startswith("train")
        if trains:
            self._rounds += 1
            if self._rounds > 1:
                self._online = self._participation.step()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the clients that `message_ids` were sent to; their replies. Each is given out once."""
        return [self._answer(self._waiting.pop(id_)) for id_ in message_ids if id_ in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push `messages` and pull all replies; a client in process is never late."""
        return self.pull_messages(self.push_messages(messages))

    def require_answers(self) -> None:
        """Raise `ValueError` when clients were asked and the app raised at every one."""
        if self.failures and not self.answered:
            reason, times = self.failures.most_common(1)[0]
            raise ValueError(f"Every client failed, {times} times with: {' '.join(reason.split())}")

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        if self._online[node_id - FIRST_NODE_ID]:
            try:
                reply = self._reply(message)
                if not isinstance(reply, Message):
                    raise TypeError(f"The client app returned a {type(reply).__name__}, not a Message.")
                self.answered += 1
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                if reason not in self.failures:
                    log.warning("The client app raised at %s", self._nodes[node_id - FIRST_NODE_ID].name, exc_info=True)
                self.failures[reason] += 1
                reply = Message(Error(CLIENT_APP_RAISED, reason), reply_to=message)
        else:
            reply = Message(Error(NODE_UNAVAILABLE, "The node is offline."), reply_to=message)
        stamp(reply, f"reply-{message.metadata.message_id}")
        return reply

    def _reply(self, message: Message) -> Message:
        """The app's reply, made with those of all waiting clients where the app can train them together."""
        together = getattr(self._app, "together", None)
        if together is None or not message.metadata.message_type.startswith("train"):
            return self._app(_delivered(message), self._context(message.metadata.dst_node_id))
        mine = message.metadata.message_id
        if mine not in self._trained:
            asked = [message, *self._waiting.values()]
            asked = [m for m in asked if m.metadata.message_type == message.metadata.message_type]
            asked = [m for m in asked if self._online[m.metadata.dst_node_id - FIRST_NODE_ID]]
            replies = together([(_delivered(m), self._context(m.metadata.dst_node_id)) for m in asked])
            self._trained = {m.metadata.message_id: r for m, r in zip(asked, replies, strict=True)}
        return self._trained.pop(mine)

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            row = node_id - FIRST_NODE_ID
            config: UserConfig = {"partition-id": row, "num-partitions": len(self._ids), **self._node_configs[row]}
            self._contexts[node_id] = Context(RUN_ID, node_id, config, RecordDict(), dict(self._run_config))
        return self._contexts[node_id]


def client_names(count: int) -> list[str]:
    """`client-00`, `client-01`, ...: their order by name is their order by number."""
    return [f"client-{i:0{len(str(count - 1))}d}" for i in range(count)]


def _delivered(message: Message) -> Message:
    """`message` as its receiver's own: many share one content, and an app may take records apart."""
    content = message.content.copy()
    for name, record in content.items():
        content[name] = record.copy()
    delivered: Message = Message(content=content, metadata=message.metadata)  # type: ignore[call-overload]  # as grids do
    return delivered
