"""Who takes part: sites by name, waiting for them, and drawing a sample from a seed."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Collection

from flwr.serverapp import Grid

log = logging.getLogger("flwr.corymb")
POLL_SECONDS = 0.5
REMIND_SECONDS = 10.0


def connected(grid: Grid) -> dict[str, int]:
    """The connected nodes, `{name: node id}`.

    A name that the operator gave stays the same over reconnects and runs; a node without one, or
    with one that another node has too, is called after its id.
    """
    nodes = [(node.name, node.node_id) for node in grid.get_nodes()]
    count = Counter(name for name, _ in nodes)
    return {name if name and count[name] == 1 else f"{name or 'node'}-{node_id}": node_id for name, node_id in nodes}


def wait_for(grid: Grid, enough: int, timeout: float) -> dict[str, int]:
    """The connected nodes once there are `enough`.

    Raises `TimeoutError` after `timeout` seconds, at once for a grid that is `complete`: nobody will join it.
    """
    started = time.monotonic()
    reminded = -REMIND_SECONDS
    while len(nodes := connected(grid)) < enough:
        waited = time.monotonic() - started
        if waited > timeout or getattr(grid, "complete", False):
            raise TimeoutError(
                f"Only {len(nodes)} of the {enough} nodes needed connected within {waited:.0f} s; "
                "start the missing ones or lower min_available_nodes."
            )
        if waited - reminded >= REMIND_SECONDS:
            log.info("Waiting for nodes: %d of %d connected after %.0f s", len(nodes), enough, waited)
            reminded = waited
        time.sleep(POLL_SECONDS)
    return nodes


def sample(names: Collection[str], fraction: float, *draw: object) -> list[str]:
    """`fraction` of `names`, at least one unless it is zero, in order; the same for the same `draw`.

    `draw` is the seed and what tells this drawing from others: a round, a phase.
    """
    ordered = sorted(names)
    if fraction >= 1:
        return ordered
    size = max(1, round(fraction * len(ordered))) if fraction > 0 and ordered else 0
    return sorted(random.Random("/".join(map(str, draw))).sample(ordered, size))
