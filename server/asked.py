"""Who was asked what: the messages of one phase, by the names of the nodes that they go to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import quick_messages


@dataclass(frozen=True)
class Asked:
    """`messages {name: message}`: node ids change from run to run, names do not."""

    messages: Mapping[str, Message] = field(default_factory=dict)

    @classmethod
    def of(cls, content: RecordDict, nodes: Mapping[str, int], kind: str, group: str) -> Asked:
        """The same `content` for all `nodes {name: node id}`."""
        return cls(dict(zip(nodes, quick_messages(content, list(nodes.values()), kind, group), strict=True)))

    @property
    def nodes(self) -> dict[str, int]:
        """`{name: node id}` of all that are asked."""
        return {name: message.metadata.dst_node_id for name, message in self.messages.items()}

    def push(self, grid: Grid, messages: list[Message]) -> dict[str, str]:
        """Send `messages`, all of ours or some; `{message id: name}` of those that the grid took."""
        taken = set(grid.push_messages(messages)) if messages else set()
        asked = {message.metadata.message_id: name for name, message in self.messages.items()}
        return {message_id: name for message_id, name in asked.items() if message_id in taken}

    def in_order(self, replies: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """`replies` that came together, with their nodes, in the order of the nodes' names.

        Errors are told by the message that they answer: the SuperLink makes them under its own node id.
        """
        by_message = {message.metadata.message_id: name for name, message in self.messages.items()}
        by_node = {node_id: name for name, node_id in self.nodes.items()}
        named: dict[str, Message] = {}
        for reply in replies:
            source = reply.metadata.src_node_id
            name = by_message.get(reply.metadata.reply_to_message_id) or by_node.get(source, f"node-{source}")
            named.setdefault(name, reply)
        return iter(sorted(named.items(), key=lambda item: item[0]))
