"""The messages of one phase of a round, training or evaluation.

They are pushed by Corymb's round loop or by Flower's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import unchecked_messages
from corymb.protocol.records import ARRAYS, CONFIG, EXTRA, NONCE, ROUND
from corymb.server.rounds.arrivals import arrivals
from corymb.server.rounds.round import Requests
from corymb.strategies import Model

Nodes = Mapping[str, int]  # {name: node id}
ArraysOf = Callable[[Model], ArrayRecord]


@dataclass(frozen=True)
class Keys:
    """The names of the records in a message: the model's arrays, and the config."""

    arrays: str = ARRAYS
    config: str = CONFIG


@dataclass
class Phase:
    """The messages of one phase.

    `connected {node id: name}` holds all connected nodes, `config` the config of the messages, and `requests` the
    messages that have been pushed.
    """

    keys: Keys = field(default_factory=Keys)
    connected: Mapping[int, str] = field(default_factory=dict)
    config: ConfigRecord = field(default_factory=ConfigRecord)
    server_round: int = 0
    _requests: Requests = field(default_factory=Requests)
    _messages: list[Message] = field(default_factory=list)  # messages that are not yet known to have been pushed

    def begin(
        self, kind: str, server_round: int, config: ConfigRecord, connected: Nodes, nodes: Nodes,
        model_for: Callable[[str], Model], arrays_of: ArraysOf, extra: ArrayRecord | None = None,
    ) -> list[Message]:  # fmt: skip
        """Begin a phase: return a message for each of `nodes`, to be pushed by the caller.

        Each message has the arrays of the model `model_for(name)`, a copy of `config` with the round's number, and the
        rule's second vector `extra`, if there is one.
        """
        self.connected = {node_id: name for name, node_id in connected.items()}
        self.config, self.server_round = config.copy(), server_round
        self.config[ROUND] = server_round
        self._messages = self._create(nodes, model_for, arrays_of, kind, str(server_round), extra)
        return list(self._messages)

    @property
    def requests(self) -> Requests:
        """The messages of this phase that have been pushed; replies are matched to nodes by message id."""
        if self._messages:  # Flower's own loop has pushed them, but does not say so
            self.requests = Requests.of(self._messages, self.connected)
        return self._requests

    @requests.setter
    def requests(self, requests: Requests) -> None:
        self._requests, self._messages = requests, []

    def evaluations(
        self, model: Model, arrays_of: ArraysOf, grid: Grid, timeout: float | None
    ) -> Iterator[tuple[str, Message]]:
        """Ask the nodes of this phase to evaluate `model`; yield their names and replies."""
        ids = {name: node_id for node_id, name in self.connected.items()}
        nodes = {name: ids[name] for name in self.requests.nodes if name in ids}
        group = f"{self.server_round}-candidate"
        config, self.config = self.config, self.config.copy()
        self.config.pop(NONCE, None)  # each candidate is a new question, which no client has answered yet
        messages = self._create(nodes, lambda name: model, arrays_of, MessageType.EVALUATE, group)
        self.config = config
        sent = push(grid, messages)
        yield from Requests.of(messages, self.connected).named(arrivals(grid, sent, timeout))

    def _create(
        self,
        nodes: Nodes,
        model_for: Callable[[str], Model],
        arrays_of: ArraysOf,
        kind: str,
        group: str,
        extra: ArrayRecord | None = None,
    ) -> list[Message]:
        """Return one message per node. Nodes that receive the same model share one content.

        `group` is the group id of the messages, which Flower shows in its log.
        """
        models: dict[int, tuple[Model, list[str]]] = {}  # each distinct model with the names of its nodes
        for name in nodes:
            model = model_for(name)
            models.setdefault(model.parameters.data_ptr(), (model, []))[1].append(name)
        messages: dict[str, Message] = {}
        for model, names in models.values():
            content = RecordDict({self.keys.arrays: arrays_of(model), self.keys.config: self.config})
            if extra is not None:
                content[EXTRA] = extra
            messages |= zip(names, unchecked_messages(content, [nodes[n] for n in names], kind, group), strict=True)
        return [messages[name] for name in nodes]


def push(grid: Grid, messages: list[Message]) -> dict[str, Message]:
    """Push `messages`. Return those that the grid accepted, `{message id: message}`."""
    accepted = set(grid.push_messages(messages)) if messages else set()
    return {m.metadata.message_id: m for m in messages if m.metadata.message_id in accepted}
