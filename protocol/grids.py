"""What a grid may offer beyond Flower's `Grid`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from flwr.app import Message


@runtime_checkable
class StreamingGrid(Protocol):
    """A grid that knows whose reply comes next, so that nobody has to poll it."""

    def stream(self, message_ids: Iterable[str]) -> Iterator[tuple[str, Message]]:
        """Replies to `message_ids` with the id that each answers, as they can be had soonest.

        Who is not waited for any more, when the iterator is closed, is not answered.
        """


@runtime_checkable
class CompleteGrid(Protocol):
    """A grid that no further node will join, so that nobody has to wait for one."""

    is_complete: bool
