"""The parts of Flower's grid that have nothing to do with delivering messages."""

from __future__ import annotations

from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from corymb.protocol.flower import empty_run


class BareGrid(Grid):
    """A grid with a run; subclasses deliver messages."""

    def __init__(self, run_id: int) -> None:
        self._run = empty_run(run_id)

    def set_run(self, run: Any) -> None:
        """Set the run of this grid."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run, as Flower's `Run`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message; Flower deprecates this method in favour of the constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
