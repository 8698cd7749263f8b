"""One phase of asking: messages are made, pushed by this server's loop or by Flower's, and replied to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import quick_messages
from corymb.protocol.records import ARRAYS, CONFIG, ROUND
from corymb.server.rounds.arrivals import arrivals
from corymb.server.rounds.round import Requests
from corymb.strategies import Model

Nodes = Mapping[str, int]  # {name: node id}
ArraysOf = Callable[[Model], ArrayRecord]


@dataclass(frozen=True)
class Keys:
    """What the records of a message are called: the model's arrays, and the config."""

    arrays: str = ARRAYS
    config: str = CONFIG


@dataclass
class Phase:
    """The messages to some of the nodes that are `connected {node id: name}`; `requests` are those that were pushed."""

    keys: Keys = field(default_factory=Keys)
    connected: Mapping[int, str] = field(default_factory=dict)
    config: ConfigRecord = field(default_factory=ConfigRecord)
    server_round: int = 0
    _requests: Requests = field(default_factory=Requests)
    _messages: list[Message] = field(default_factory=list)  # until they are known to have been pushed

    def ask(
        self, kind: str, server_round: int, config: ConfigRecord, connected: Nodes, nodes: Nodes,
        model_for: Callable[[str], Model], arrays_of: ArraysOf,
    ) -> list[Message]:  # fmt: skip
        """Begin a phase.

        A message for each of `nodes`, with `model_for(name)`, and `config` with the round's number.
        """
        self.connected = {node_id: name for name, node_id in connected.items()}
        self.config, self.server_round = config.copy(), server_round
        self.config[ROUND] = server_round
        self._messages = self._made(nodes, model_for, arrays_of, kind, str(server_round))
        return list(self._messages)

    def sent(self, messages: Iterable[Message]) -> None:
        """Take note that these messages have been pushed; replies are told by their ids."""
        self._requests, self._messages = Requests.of(messages, self.connected), []

    @property
    def requests(self) -> Requests:
        """Who was asked, once the messages have been pushed."""
        if self._messages:  # Flower's own loop has pushed them by now, and does not say so
            self.sent(self._messages)
        return self._requests

    def evaluations(
        self, model: Model, arrays_of: ArraysOf, grid: Grid, timeout: float | None
    ) -> Iterator[tuple[str, Message]]:
        """Have the nodes of this phase evaluate `model`: their names and replies."""
        ids = {name: node_id for node_id, name in self.connected.items()}
        nodes = {name: ids[name] for name in self.requests.nodes if name in ids}
        group = f"{self.server_round}-candidate"
        messages = self._made(nodes, lambda name: model, arrays_of, MessageType.EVALUATE, group)
        sent = push(grid, messages)
        yield from Requests.of(messages, self.connected).named(arrivals(grid, sent, timeout))

    def _made(
        self, nodes: Nodes, model_for: Callable[[str], Model], arrays_of: ArraysOf, kind: str, group: str
    ) -> list[Message]:
        """Nodes that are sent the same model share one content. Flower's log shows `group`."""
        models: dict[int, tuple[Model, list[str]]] = {}  # one for all nodes, or several that a rule keeps
        for name in nodes:
            model = model_for(name)
            models.setdefault(model.parameters.data_ptr(), (model, []))[1].append(name)
        messages: dict[str, Message] = {}
        for model, names in models.values():
            content = RecordDict({self.keys.arrays: arrays_of(model), self.keys.config: self.config})
            messages |= zip(names, quick_messages(content, [nodes[n] for n in names], kind, group), strict=True)
        return [messages[name] for name in nodes]


def push(grid: Grid, messages: list[Message]) -> dict[str, Message]:
    """Send `messages`; those that the grid took, by their ids."""
    taken = set(grid.push_messages(messages)) if messages else set()
    return {m.metadata.message_id: m for m in messages if m.metadata.message_id in taken}
