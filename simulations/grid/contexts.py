"""The Contexts of a LocalGrid's nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, RecordDict, UserConfig

RUN_ID = 1
FIRST_NODE_ID = 1000


class Contexts:
    """The Context of each of `count` nodes. Only those with state are stored, so that idle nodes need no memory."""

    def __init__(
        self, count: int, run_config: Mapping[str, Any], node_config: Callable[[int], UserConfig], run_id: int
    ) -> None:
        self._count, self._node_config, self._run_id = count, node_config, run_id
        self._run_config: UserConfig = dict(run_config)
        self._stored: dict[int, Context] = {}

    def of(self, node_id: int) -> Context:
        """Return the node's Context."""
        if node_id in self._stored:
            return self._stored[node_id]
        row = node_id - FIRST_NODE_ID
        config = {"partition-id": row, "num-partitions": self._count, **self._node_config(row)}
        return Context(self._run_id, node_id, config, RecordDict(), self._run_config.copy())

    def of_server(self, server_id: int) -> Context:
        """Return a Context for a ServerApp."""
        return Context(self._run_id, server_id, {}, RecordDict(), self._run_config.copy())

    def keep(self, context: Context) -> None:
        """Keep the state of `context`, if it has any."""
        if context.state:
            self._stored[context.node_id] = context
