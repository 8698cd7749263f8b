"""A round: the messages that were sent to the nodes, and the method that aggregates the replies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from corymb.protocol.sizes import bytes_in
from corymb.server.rounds.staleness import Asynchrony, Start
from corymb.server.rounds.state import Method


@dataclass(frozen=True)
class Requests:
    """The messages of one phase of a round.

    `by_message {message id: node name}` holds the messages that the grid accepted, `nodes` the names of all
    addressees, and `connected {node id: name}` all nodes that were connected. Node ids change from run to run, names
    do not. `bytes_down {node name: bytes}` are the sizes of the messages' arrays, where they are known.
    """

    by_message: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    connected: Mapping[int, str] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Iterable[Message], connected: Mapping[int, str]) -> Requests:
        """Make the requests from `messages` that have been pushed; the grid sets the id of a message on the push."""
        by_message, bytes_down, sizes = {}, {}, {}
        nodes = []
        for message in messages:
            metadata = message.metadata
            node_id, message_id = metadata.dst_node_id, metadata.message_id
            nodes.append(connected.get(node_id, f"node-{node_id}"))
            if id(message.content) not in sizes:  # messages share their content
                sizes[id(message.content)] = bytes_in(message.content)
            if message_id:
                by_message[message_id] = nodes[-1]
                bytes_down[nodes[-1]] = sizes[id(message.content)]
        return cls(by_message, tuple(nodes), connected, bytes_down)

    def name_of(self, reply: Message) -> str:
        """Return the name of the node that sent `reply`: the addressee of the request, or else the source node.

        The addressee takes precedence, because a SuperLink creates error replies under its own node id.
        """
        name = self.by_message.get(reply.metadata.reply_to_message_id)
        return self._source(reply) if name is None else name

    def is_forged(self, reply: Message) -> bool:
        """Return whether the source of `reply` is another node than the one that was asked. Both come from the client,
        so neither can be trusted; False if node ids are not known.
        """
        asked = self.by_message.get(reply.metadata.reply_to_message_id)
        if asked is None or not self.connected or asked == self._source(reply):
            return False
        return not reply.has_error() or reply.metadata.src_node_id in self.connected  # else it is the SuperLink's

    def _source(self, reply: Message) -> str:
        source = reply.metadata.src_node_id
        return self.connected.get(source, f"node-{source}")

    def named(self, replies: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """Yield each reply with the name of its node."""
        for reply in replies:
            yield self.name_of(reply), reply
            del reply


@dataclass(frozen=True)
class Asked:
    """What was asked in one phase of a round of the Flower run `run_id`, at the Unix time `at`.

    `nonce` is in the config of the requests, and the same if a node is asked again. `remembers` says by node whether
    its client answers from memory, as far as that was known.
    """

    nonce: str
    requests: Requests
    at: float
    run_id: int
    remembers: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """Round `number`, from 1. Each node received the state's model, or a model that the rule keeps for this node.

    Without rounds, the nodes in `starts` have begun from earlier models, and `asynchrony` says what that means.
    """

    number: int
    method: Method
    requests: Requests
    starts: Mapping[str, Start] = field(default_factory=dict)
    asynchrony: Asynchrony | None = None
