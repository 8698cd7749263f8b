"""The messages of a LocalGrid whose clients have not started yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

from flwr.app import Message

from corymb.protocol.flower import set_message_id


class WaitingMessages:
    """Messages by id, in the order in which they were pushed."""

    def __init__(self) -> None:
        self._messages: dict[str, Message] = {}
        self._count_at: Counter[int] = Counter()  # messages by node id
        self._numbers = count(1)

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._messages

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._messages))

    def __getitem__(self, message_id: str) -> Message:
        return self._messages[message_id]

    def add(self, message: Message) -> str:
        """Add `message`, give it an id, and return the id."""
        message_id = f"message-{next(self._numbers)}"
        set_message_id(message, message_id)
        self._messages[message_id] = message
        self._count_at[message.metadata.dst_node_id] += 1
        return message_id

    def take(self, message_id: str) -> Message:
        """Remove and return a message."""
        message = self._messages.pop(message_id)
        self._count_at[message.metadata.dst_node_id] -= 1
        return message

    def oldest_at(self, message_id: str) -> str:
        """Return the id of the oldest message to the node that this message goes to."""
        node_id = self._messages[message_id].metadata.dst_node_id
        if self._count_at[node_id] == 1:
            return message_id
        return next(each for each, message in self._messages.items() if message.metadata.dst_node_id == node_id)
