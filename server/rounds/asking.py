"""The requests of one phase: which nodes have answered, and which are overdue and asked again."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import MESSAGE_LOST, NODE_UNAVAILABLE, set_message_id, set_reply_to, unchecked_messages
from corymb.protocol.records import DEADLINE, NONCE, of_kind
from corymb.protocol.signatures import RECORD as SIGNATURE
from corymb.protocol.sizes import bytes_of
from corymb.server.rounds.events import Event, EventLog, some
from corymb.server.rounds.rejections import UNREADABLE
from corymb.server.rounds.requests import push
from corymb.server.rounds.round import Asked

log = logging.getLogger("flwr.corymb")
MOST_ASKS = 4  # times that a node is asked in one phase
REMIND_SECONDS = 30.0  # between two log lines about nodes that have not answered
SLACK_SECONDS = 30.0
BACK_SECONDS = 40.0  # in which an offline node may come back; a SuperNode sends a heartbeat every half a minute
LEAST_LEFT = 5.0  # seconds to the deadline, below which nobody is asked again


def overdue_after(durations: Collection[float], asks: int) -> float | None:
    """Return after how many seconds a node that was asked `asks` times is asked again; None while that is not known.

    `durations` are those of the replies so far, in seconds, or the longest of the last round while there are none. A
    node is overdue after twice the longest, and half a minute more; each further request waits twice as long.
    """
    return (2 * max(durations) + SLACK_SECONDS) * 2 ** (asks - 1) if durations else None


class Asking:
    """What was `asked` in a phase of round `number`, with the `messages` to ask again with, until `ends` (Unix time).

    A node is asked again, with a copy of its message, if it is overdue, if its reply was lost, or if it was offline and
    has come back. Only clients that answer such a request from memory are asked again: their replies repeat
    the nonce of the request. `remembers` says so by node, and is updated; a node that has never replied is taken for
    what all others are. `longest` has the longest duration of a reply by phase, and is updated.
    """

    def __init__(
        self,
        grid: Grid,
        number: int,
        phase: str,
        asked: Asked,
        messages: list[Message],
        ends: float,
        remembers: dict[str, bool],
        longest: dict[str, float],
        events: EventLog,
    ) -> None:
        self.asked, self.ends, requests = asked, ends, asked.requests
        self._round, self._phase = number, phase
        self._grid, self._remembers, self._events = grid, remembers, events
        ids = {name: node_id for node_id, name in requests.connected.items()}
        self._ids = {name: ids[name] for name in requests.by_message.values() if name in ids}
        originals = {message.metadata.dst_node_id: message for message in messages}
        self._originals = {name: originals[n] for name, n in self._ids.items() if n in originals}
        self.sent = {i: self._standing_for(i, name) for i, name in requests.by_message.items() if name in self._ids}
        self.waiting: dict[str, None] = dict.fromkeys(self.sent)
        self.durations: list[float] = []  # of the replies so far
        self._longest, self._before = longest, [longest[phase]] if phase in longest else []
        self._node_of = dict(requests.by_message)
        self._asks = dict.fromkeys(self._ids, 1)
        self._answered: set[str] = set()
        # What Flower says of a node that may come back, or that cannot be asked again now, and since when.
        self._offline: dict[str, tuple[Message, float]] = {}
        self._reminded = time.monotonic()

    def unanswered(self) -> dict[str, list[str]]:
        """Return the nodes that have not answered, each with the ids of the messages to it."""
        nodes: dict[str, list[str]] = {name: [] for name in self._ids if name not in self._answered}
        for message_id, name in self._node_of.items():
            if name in nodes:
                nodes[name].append(message_id)
        return nodes

    def accept(self, reply: Message, kept_at: float | None = None) -> bool:
        """Return whether `reply` counts. `kept_at` is the time of its arrival before a restart of the server.

        It does not count if the node has answered before, or if its reply was lost and it is asked again. Flower's
        word that the node is offline does not count yet; see `still_offline`.
        """
        asked_id = reply.metadata.reply_to_message_id
        name = self._node_of.get(asked_id)
        if name is None or name in self._answered:
            return False
        if asked_id not in self.asked.requests.by_message:  # the reply to a request that was repeated
            set_reply_to(reply, next(i for i, node in self.asked.requests.by_message.items() if node == name))
        seconds = max(0.0, (time.time() if kept_at is None else kept_at) - self.asked.at)
        if reply.has_error():
            is_offline = reply.error.code == NODE_UNAVAILABLE
            is_lost = reply.error.code in {*MESSAGE_LOST, UNREADABLE}
            if (is_offline or is_lost) and kept_at is None and self._has_asks_left(name) and self._is_ready(name, True):
                if is_offline:
                    self._events.add(Event(self._round, self._phase, name, "offline", seconds))
                if is_offline or not self._ask_again(name, "lost"):
                    self._offline[name] = reply, time.monotonic()
                return False
        else:
            self.durations.append(seconds)
            self._longest[self._phase] = max(self.durations)
            configs = of_kind(reply.content, ConfigRecord)
            self._remembers[name] = any(record.get(NONCE) == self.asked.nonce for record in configs)
        self._answered.add(name)
        self._offline.pop(name, None)
        for message_id in [i for i, node in self._node_of.items() if node == name]:
            self.waiting.pop(message_id, None)
        if kept_at is None:
            left = [node for node in self._ids if node not in self._answered]
            kind = "failed" if reply.has_error() else "replied"
            self._events.add(Event(self._round, self._phase, name, kind, seconds, bytes_of(reply)), left)
        return True

    @property
    def awaits_return(self) -> bool:
        """Whether a node is offline and may come back."""
        return bool(self._offline)

    def still_offline(self, is_over: bool = False) -> Iterator[Message]:
        """Yield what Flower says of the nodes that have been offline for too long, or of all if the phase `is_over`.

        They are not asked again. Nor are those whose clients, as is known by now, do not answer from memory.
        """
        for name, (reply, since) in list(self._offline.items()):
            if is_over or time.monotonic() - since >= BACK_SECONDS or not self._is_ready(name, True):
                del self._offline[name]
                self._asks[name] = MOST_ASKS
                yield reply

    def attend(self) -> None:
        """Ask the nodes again that are overdue or back, and log who has not answered.

        To be called while no reply arrives.
        """
        left = self.unanswered()
        elapsed = time.time() - self.asked.at
        if time.monotonic() - self._reminded >= REMIND_SECONDS:
            self._reminded = time.monotonic()
            self._events.log("[ROUND %d] waiting for %s (%s, %.0f s)", self._round, some(left), self._phase, elapsed)
        online: set[int] | None = None
        for name in left:
            limit = overdue_after(self.durations or self._before, self._asks[name])
            was_offline = name in self._offline
            if (was_offline or (limit is not None and elapsed > limit)) and self._may_ask_again(name):
                online = self._online() if online is None else online
                if self._ids[name] in online and self._ask_again(name, self._why(name)):
                    self._offline.pop(name, None)

    def _online(self) -> set[int]:
        try:
            return {node.node_id for node in self._grid.get_nodes()}
        except Exception as error:  # the SuperLink is away or fails; the next call may succeed
            log.warning("The SuperLink does not say which nodes are online (%s).", error)
            self._offline = {name: (reply, time.monotonic()) for name, (reply, _) in self._offline.items()}
            return set()

    def _is_ready(self, name: str, if_unknown: bool = False) -> bool:
        """Return whether the client at a node answers from memory, as far as is known; else `if_unknown`."""
        known = self._remembers.values()
        return self._remembers.get(name, all(known) if known else if_unknown)

    def _why(self, name: str) -> str:
        """Return why a node that has not answered is asked again."""
        if name not in self._offline:
            return "overdue"
        return "back" if self._offline[name][0].error.code == NODE_UNAVAILABLE else "lost"

    def _has_asks_left(self, name: str) -> bool:
        left = self.ends - time.time() >= LEAST_LEFT and self._asks.get(name, MOST_ASKS) < MOST_ASKS
        return left and name in self._originals

    def _may_ask_again(self, name: str) -> bool:
        return self._has_asks_left(name) and self._is_ready(name)

    def _ask_again(self, name: str, why: str) -> bool:
        """Send the message to a node again. Returns whether that was possible."""
        if not self._may_ask_again(name):
            return False
        again = copy_of(self._originals[name], self.ends - time.time())
        try:
            (accepted,) = push(self._grid, [again]) or [""]
        except Exception as error:
            log.warning("The node %s could not be asked again (%s).", name, error)
            if name in self._offline:
                self._offline[name] = self._offline[name][0], time.monotonic()
            return False
        if not accepted:
            return False
        self._asks[name] += 1
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


def copy_of(message: Message, seconds_left: float) -> Message:
    """Return a new message with the content of `message`, and what is left of the deadline."""
    content = RecordDict({name: record for name, record in message.content.items() if name != SIGNATURE})
    for name, record in message.content.items():
        if isinstance(record, ConfigRecord) and DEADLINE in record:
            content[name] = ConfigRecord({**record, DEADLINE: seconds_left})
    metadata = message.metadata
    (copy,) = unchecked_messages(content, [metadata.dst_node_id], metadata.message_type, metadata.group_id)
    return copy
