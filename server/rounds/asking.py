"""The requests of one phase: which nodes have answered, and which are overdue and asked again."""

from __future__ import annotations

import time
from collections.abc import Collection

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import MESSAGE_LOST, set_message_id, set_reply_to, unchecked_messages
from corymb.protocol.records import NONCE, of_kind
from corymb.server.rounds.events import Event, EventLog, size_of, some
from corymb.server.rounds.rejections import UNREADABLE
from corymb.server.rounds.requests import push
from corymb.server.rounds.round import Asked

MOST_ASKS = 4  # times that a node is asked in one phase
REMIND_SECONDS = 30.0  # between two log lines about nodes that have not answered
SLACK_SECONDS = 30.0


def overdue_after(durations: Collection[float], asks: int) -> float | None:
    """Return after how many seconds a node that was asked `asks` times is asked again; None while that is not known.

    `durations` are those of the replies so far, in seconds. A node is overdue after twice the longest, and half a
    minute more; each further request waits twice as long.
    """
    return (2 * max(durations) + SLACK_SECONDS) * 2 ** (asks - 1) if durations else None


class Asking:
    """What was `asked` in a phase of round `number`, with the `messages` to ask again with.

    A node is asked again, with a copy of its message, if it is overdue or if its reply was lost. Only clients that
    answer such a request from memory are asked again: their replies repeat the nonce of the request.
    """

    def __init__(
        self, grid: Grid, number: int, phase: str, asked: Asked, messages: list[Message], events: EventLog
    ) -> None:
        self.asked, requests = asked, asked.requests
        self._round, self._phase = number, phase
        self._grid, self._events = grid, events
        ids = {name: node_id for node_id, name in requests.connected.items()}
        self._ids = {name: ids[name] for name in requests.by_message.values() if name in ids}
        originals = {message.metadata.dst_node_id: message for message in messages}
        self._originals = {name: originals[n] for name, n in self._ids.items() if n in originals}
        self.sent = {i: self._standing_for(i, name) for i, name in requests.by_message.items() if name in self._ids}
        self.waiting: dict[str, None] = dict.fromkeys(self.sent)
        self._node_of = dict(requests.by_message)
        self._asks = dict.fromkeys(self._ids, 1)
        self._answered: set[str] = set()
        self._durations: list[float] = []
        self._remembers = False  # whether the clients answer from memory
        self._reminded = time.monotonic()

    def unanswered(self) -> dict[str, list[str]]:
        """Return the nodes that have not answered, each with the ids of the messages to it."""
        nodes: dict[str, list[str]] = {name: [] for name in self._ids if name not in self._answered}
        for message_id, name in self._node_of.items():
            if name in nodes:
                nodes[name].append(message_id)
        return nodes

    def accept(self, reply: Message) -> float | None:
        """Return after how many seconds `reply` came; None if it does not count.

        It does not if the node has answered before, or if its reply was lost and it is asked again.
        """
        asked_id = reply.metadata.reply_to_message_id
        name = self._node_of.get(asked_id)
        if name is None or name in self._answered:
            return None
        if asked_id not in self.asked.requests.by_message:  # the reply to a request that was repeated
            set_reply_to(reply, next(i for i, node in self.asked.requests.by_message.items() if node == name))
        seconds = max(0.0, time.time() - self.asked.at)
        if reply.has_error():
            code = reply.error.code
            if (code in MESSAGE_LOST or (code == UNREADABLE and self._remembers)) and self._ask_again(name, "lost"):
                return None
        else:
            self._durations.append(seconds)
            self._remembers = self._remembers or any(NONCE in record for record in of_kind(reply.content, ConfigRecord))
        self._answered.add(name)
        for message_id in [i for i, node in self._node_of.items() if node == name]:
            self.waiting.pop(message_id, None)
        left = [node for node in self._ids if node not in self._answered]
        kind = "failed" if reply.has_error() else "replied"
        self._events.add(Event(self._round, self._phase, name, kind, seconds, size_of(reply)), left)
        return seconds

    def attend(self) -> None:
        """Ask the nodes that are overdue again, and log who has not answered. To be called while no reply arrives."""
        left = self.unanswered()
        elapsed = time.time() - self.asked.at
        if time.monotonic() - self._reminded >= REMIND_SECONDS:
            self._reminded = time.monotonic()
            self._events.log("[ROUND %d] waiting for %s (%s, %.0f s)", self._round, some(left), self._phase, elapsed)
        if not self._remembers:
            return
        online = None
        for name in left:
            limit = overdue_after(self._durations, self._asks[name])
            if limit is not None and elapsed > limit:
                online = {node.node_id for node in self._grid.get_nodes()} if online is None else online
                if self._ids[name] in online:
                    self._ask_again(name, "overdue")

    def _ask_again(self, name: str, why: str) -> bool:
        """Send the message to a node again. Returns whether that was possible."""
        original = self._originals.get(name)
        if original is None or self._asks[name] >= MOST_ASKS:
            return False
        self._asks[name] += 1
        (again,) = _copies(original)
        (accepted,) = push(self._grid, [again]) or [""]
        if not accepted:
            return False
        self.sent[accepted] = again
        self._node_of[accepted] = name
        self.waiting[accepted] = None
        self._events.add(Event(self._round, self._phase, name, "asked again", detail=why))
        return True

    def _standing_for(self, message_id: str, name: str) -> Message:
        """Return a message with `message_id` in place of the one that was sent, without its content."""
        (message,) = unchecked_messages(RecordDict(), [self._ids[name]], "train", "")
        set_message_id(message, message_id)
        return message


def _copies(message: Message) -> list[Message]:
    metadata = message.metadata
    return unchecked_messages(message.content, [metadata.dst_node_id], metadata.message_type, metadata.group_id)
