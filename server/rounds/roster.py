"""Who takes part: sites by name, waiting for them, and drawing a sample from a seed."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from flwr.serverapp import Grid

from corymb.protocol.grids import CompleteGrid

log = logging.getLogger("flwr.corymb")
POLL_SECONDS = 0.5
REMIND_SECONDS = 10.0


@dataclass(frozen=True)
class Sampling:
    """Which of the connected nodes are asked. `train` and `evaluate` are the fractions for each phase.

    A round begins once `available` nodes have connected; `TimeoutError` is raised when they have not in `seconds`.
    """

    train: float = 1.0
    evaluate: float = 1.0
    available: int = 2
    seconds: float = 3600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fraction in (("fraction_train", self.train), ("fraction_evaluate", self.evaluate)):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} = {fraction} must lie in [0, 1]; 1 asks every connected node.")

    def for_training(self, grid: Grid, server_round: int) -> tuple[dict[str, int], dict[str, int]]:
        """The connected nodes, once there are enough, and those who are asked to train: `{name: node id}` each."""
        nodes = wait_for(grid, self.available, self.seconds)
        return nodes, self._drawn(nodes, self.train, server_round, "train")

    def for_evaluation(self, grid: Grid, server_round: int) -> tuple[dict[str, int], dict[str, int]]:
        """The connected nodes, and those who are asked to evaluate: `{name: node id}` each."""
        nodes = connected(grid) if self.evaluate else {}
        return nodes, self._drawn(nodes, self.evaluate, server_round, "evaluate")

    def _drawn(self, nodes: dict[str, int], fraction: float, server_round: int, phase: str) -> dict[str, int]:
        return {name: nodes[name] for name in sample(nodes, fraction, self.seed, server_round, phase)}


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

    Raises `TimeoutError` after `timeout` seconds, at once for a grid that is complete: nobody will join it.
    """
    started = time.monotonic()
    reminded = -REMIND_SECONDS
    while len(nodes := connected(grid)) < enough:
        waited = time.monotonic() - started
        if waited > timeout or (isinstance(grid, CompleteGrid) and grid.is_complete):
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
