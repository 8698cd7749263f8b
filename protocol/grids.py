"""Optional features of a grid, beyond Flower's `Grid`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message


@runtime_checkable
class StreamingGrid(Protocol):
    """A grid that yields replies as they become available, so that the caller need not poll."""

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """Yield `(message id, reply)` for each of `message_ids`, in the order in which the replies become available.

        Closing the iterator discards the messages that have no reply yet.
        """


@runtime_checkable
class CompleteGrid(Protocol):
    """A grid that reports whether more nodes can join. If `is_complete`, callers do not wait for more nodes."""

    is_complete: bool


@runtime_checkable
class TimedGrid(Protocol):
    """A grid in virtual time, which knows the order in which replies arrive."""

    def next_arrival(self) -> tuple[str, Message] | None:
        """Return the next reply to any message, by its id; None if no message is under way."""


@runtime_checkable
class SigningGrid(Protocol):
    """A grid that signs messages. What it pushes it signs anyway; whoever needs their ids beforehand asks for it."""

    def sign(self, message: Message) -> Message:
        """Return `message` with a signature."""
