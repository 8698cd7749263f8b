"""A SuperLink and its nodes in this process, in which a test decides what happens to each message, and when.

The nodes answer from memory, as ready clients do. A reply is delivered once, as by Flower's SuperLink.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from corymb.client.memory import answer_from_memory
from corymb.protocol.codec import to_arrays, to_state
from corymb.protocol.flower import NODE_UNAVAILABLE, empty_run, node_info, set_message_id, set_task_identity
from corymb.protocol.records import copied_message

FIRST_ID = 100


@dataclass
class WireNode:
    """A node: its queue of messages, its Context, and how often it has trained in each round."""

    number: int
    context: Context
    queue: deque[Message] = field(default_factory=deque)
    trained: Counter[int] = field(default_factory=Counter)


class Wire(Grid):
    """A grid with `nodes` nodes. `before_pull` is called before each pull, and may let nodes answer.

    The nodes answer repeated requests from memory if they `remember`; else they are like clients of other makers.
    """

    def __init__(
        self, nodes: int, before_pull: Callable[[Wire], None] = lambda wire: None, remembers: bool = True
    ) -> None:
        set_task_identity(run_id=7, node_id=1)
        self.nodes = [WireNode(i, Context(7, FIRST_ID + i, {}, RecordDict(), {})) for i in range(nodes)]
        self.ready: dict[str, Message] = {}
        self.pushed: Counter[str] = Counter()  # by node
        self.offline: set[int] = set()  # numbers of nodes
        self.before_pull, self._messages, self._remembers = before_pull, 0, remembers
        self._run = empty_run(7)

    def answer(self, node: WireNode, is_lost: bool = False) -> None:
        """Let `node` process the first message in its queue; its reply is lost if `is_lost`."""
        message = node.queue.popleft()
        copied = copied_message(message)
        if self._remembers:
            reply = answer_from_memory(copied, node.context, lambda m, c: self._train(node, m))
        else:
            reply = self._train(node, copied)
        if not is_lost:
            self.ready[message.metadata.message_id] = reply

    def _train(self, node: WireNode, message: Message) -> Message:
        """Raise the node's own number for this round by the number of nodes, as the app `one_hot` does."""
        (config,) = [record for record in message.content.values() if isinstance(record, ConfigRecord)]
        (arrays,) = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
        number = int(config["server-round"])  # type: ignore[arg-type]
        node.trained[number] += 1
        counts = to_state(arrays)["counts"].clone()
        counts[number - 1, node.number] += len(self.nodes)
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": to_arrays({"counts": counts}), "metrics": metrics}), reply_to=message)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """See `Grid`."""
        ids = []
        for message in messages:
            self._messages += 1
            set_message_id(message, message.metadata.message_id or f"message-{self._messages}")
            ids.append(message.metadata.message_id)
            node = self.nodes[message.metadata.dst_node_id - FIRST_ID]
            node.queue.append(message)
            self.pushed[f"node-{message.metadata.dst_node_id}"] += 1
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """See `Grid`."""
        self.before_pull(self)
        for node in self.nodes:
            if node.number in self.offline:  # the SuperLink says so once for each message, which it deletes
                for message in node.queue:
                    error = Message(Error(NODE_UNAVAILABLE, "offline"), reply_to=message)
                    self.ready[message.metadata.message_id] = error
                node.queue.clear()
        return [self.ready.pop(message_id) for message_id in message_ids if message_id in self.ready]

    def get_nodes(self) -> list[Any]:
        """See `Grid`."""
        return [node_info(FIRST_ID + node.number, "") for node in self.nodes if node.number not in self.offline]

    def get_node_ids(self) -> list[int]:
        """See `Grid`."""
        return [FIRST_ID + node.number for node in self.nodes]

    def set_run(self, run: Any) -> None:
        """See `Grid`."""

    @property
    def run(self) -> Any:
        """See `Grid`."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used."""
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Not used."""
        raise NotImplementedError


def initial_counts(rounds: int, nodes: int) -> ArrayRecord:
    """Return the model: one number for each node in each round, all 0."""
    return to_arrays({"counts": torch.zeros(rounds, nodes)})
