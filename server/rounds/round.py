"""One round as it was asked: who was asked by which message, and by what method the replies are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from corymb.server.rounds.state import Method


@dataclass(frozen=True)
class Requests:
    """`by_message {message id: node name}` are the messages that were sent, `asked` the nodes that they were meant for,
    whether or not the grid took them, and `connected {node id: name}` all nodes that were there.

    Node ids change from run to run, names do not.
    """

    by_message: Mapping[str, str] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    connected: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Iterable[Message], connected: Mapping[int, str]) -> Requests:
        """Of `messages` that have been pushed: a grid gives a message its id then."""
        by_message = {}
        asked = []
        for message in messages:
            node_id, message_id = message.metadata.dst_node_id, message.metadata.message_id
            asked.append(connected.get(node_id, f"node-{node_id}"))
            if message_id:
                by_message[message_id] = asked[-1]
        return cls(by_message, tuple(asked), connected)

    def name_of(self, reply: Message) -> str:
        """The node that `reply` is from: that of the message it answers, else the one that it says sent it.

        A SuperLink makes error replies under its own node id, so the message goes before.
        """
        name = self.by_message.get(reply.metadata.reply_to_message_id)
        source = reply.metadata.src_node_id
        return name or self.connected.get(source, f"node-{source}")

    def named(self, replies: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """`replies`, one at a time, with the names of their nodes."""
        for reply in replies:
            yield self.name_of(reply), reply
            del reply


@dataclass(frozen=True)
class Round:
    """Round `number`, from 1. What the nodes were sent is the state's model, or what the rule keeps for each."""

    number: int
    method: Method
    requests: Requests
