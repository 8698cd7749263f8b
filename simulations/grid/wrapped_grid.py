"""A base class for grids that wrap another grid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.grids import CompleteGrid


class WrappedGrid(Grid):
    """A grid that delegates every call to `grid`; subclasses override what they change."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @property
    def is_complete(self) -> bool:
        """See `CompleteGrid`."""
        return isinstance(self._grid, CompleteGrid) and self._grid.is_complete

    def set_run(self, run: Any) -> None:
        """Set the run of this grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run, as Flower's `Run`."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message; Flower deprecates this method in favour of the constructor."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return all nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send `messages` and return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to `message_ids` that have arrived."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push `messages` and return their replies; waits at most `timeout` seconds, None without limit."""
        return self._grid.send_and_receive(messages, timeout=timeout)
