"""The nodes that take part in a round: waiting for connections, and sampling by name from a seed."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from flwr.serverapp import Grid

from corymb.protocol.grids import CompleteGrid
from corymb.server.rounds.patience import patiently

log = logging.getLogger("flwr.corymb")
POLL_SECONDS = 0.5
REMIND_SECONDS = 10.0  # between two log lines while waiting
REJOIN_SECONDS = 60.0  # that a later round waits for nodes that have left: Flower notices a lost node after this time


@dataclass(frozen=True)
class Sampling:
    """Settings for the sampling of nodes. `train` and `evaluate` are the sampled fractions in the two phases of a
    round, rounded down as in Flower; at least `min_train` and `min_evaluate` nodes are sampled, if as many are
    connected. A fraction of 0 samples no node. `sites_to_start` nodes are sampled for training instead, unless it is 0.

    The first round begins once `min_nodes` nodes are connected. If that takes longer than `timeout`, `TimeoutError` is
    raised. A later round waits for up to a minute for nodes that have left since the round before. It then goes on
    with those that are connected, if there are `least`.
    """

    train: float = 1.0
    evaluate: float = 1.0
    min_nodes: int = 2
    timeout: float = 3600.0
    seed: int = 0
    min_train: int = 2
    min_evaluate: int = 2
    least: int = 1
    sites_to_start: int = 0

    def __post_init__(self) -> None:
        for name, fraction in (("fraction_train", self.train), ("fraction_evaluate", self.evaluate)):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} is {fraction}; use a value in [0, 1], such as 1 for all connected nodes.")

    def for_training(
        self, grid: Grid, server_round: int, out: Collection[str] = (), busy: Collection[str] = (),
        before: int | None = None,
    ) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
        """Wait for enough nodes. Return the connected nodes and the sampled ones, each as `{name: node id}`.

        Nodes that are `out` are not sampled, and those that are `busy` only if there are too few others. `before` is
        the number of nodes that were connected in the round before, None in the first round.
        """
        enough = self.min_nodes if before is None else min(self.min_nodes, before)
        patience = self.timeout if before is None else REJOIN_SECONDS
        if before is not None and not is_complete(grid) and not has_joined(grid, enough, patience):
            enough, patience = min(self.least, enough), self.timeout
        nodes = wait_for(grid, enough, patience)
        fraction, minimum = (1e-9, self.sites_to_start) if self.sites_to_start else (self.train, self.min_train)
        return nodes, self._sampled(nodes, out, busy, fraction, minimum, server_round, "train")

    def for_evaluation(
        self, grid: Grid, server_round: int, out: Collection[str] = (), busy: Collection[str] = ()
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return the connected nodes and those sampled for evaluation, each as `{name: node id}`."""
        nodes = connected(grid) if self.evaluate else {}
        return nodes, self._sampled(nodes, out, busy, self.evaluate, self.min_evaluate, server_round, "evaluate")

    def _sampled(
        self, nodes: dict[str, int], out: Collection[str], busy: Collection[str], fraction: float, minimum: int,
        *draw: object,
    ) -> dict[str, int]:  # fmt: skip
        allowed = [name for name in nodes if name not in out]
        idle = [name for name in allowed if name not in busy]
        names = idle if len(idle) >= self.least else allowed
        return {name: nodes[name] for name in sample(names, fraction, minimum, self.seed, *draw)}


def connected(grid: Grid) -> dict[str, int]:
    """Return the connected nodes, `{name: node id}`.

    A name that the operator gave stays the same over reconnects and runs. For a node without such a name, or with a
    name that another node has too, the returned name contains the node id.
    """
    nodes = [(node.name, node.node_id) for node in patiently(grid.get_nodes)]
    count = Counter(name for name, _ in nodes)
    return {name if name and count[name] == 1 else f"{name or 'node'}-{node_id}": node_id for name, node_id in nodes}


def has_joined(grid: Grid, enough: int, seconds: float) -> bool:
    """Return whether `enough` nodes are connected within `seconds`."""
    try:
        wait_for(grid, enough, seconds)
    except TimeoutError as error:
        log.warning("%s The round goes on without them.", error)
        return False
    return True


def is_complete(grid: Grid) -> bool:
    """Return whether no more nodes will join."""
    return isinstance(grid, CompleteGrid) and grid.is_complete


def wait_for(
    grid: Grid, enough: int, timeout: float, is_over: Callable[[], bool] = lambda: False
) -> dict[str, int]:  # fmt: skip
    """Wait until `enough` nodes are connected, or `is_over()`, and return the connected nodes, `{name: node id}`.

    Raises `TimeoutError` after `timeout` seconds, or at once if the grid reports that no more nodes will join. The time
    until the grid answers does not count: while the SuperLink is away, no node can connect.
    """
    waited, reminded = 0.0, -REMIND_SECONDS
    while len(nodes := connected(grid)) < enough and not is_over():
        answered = time.monotonic()
        if waited > timeout or is_complete(grid):
            raise TimeoutError(
                f"Only {len(nodes)} of {enough} required nodes connected within {waited:.0f} s; "
                "start the missing nodes or lower min_available_nodes."
            )
        if waited - reminded >= REMIND_SECONDS:
            log.info("Waiting for nodes: %d of %d connected after %.0f s", len(nodes), enough, waited)
            reminded = waited
        time.sleep(POLL_SECONDS)
        waited += time.monotonic() - answered
    return nodes


def sample(names: Collection[str], fraction: float, minimum: int, *draw: object) -> list[str]:
    """Return a sorted sample of `fraction * len(names)` names, rounded down, but of `minimum` if there are as many.

    A `fraction` of 0 gives no name. The sample depends on `names`, `fraction`, `minimum` and `draw` only. `draw` is
    the seed and the labels of this sample, such as the round and the phase.
    """
    ordered = sorted(names)
    if fraction >= 1:
        return ordered
    size = min(len(ordered), max(minimum, int(fraction * len(ordered)))) if fraction > 0 else 0
    return sorted(random.Random("/".join(map(str, draw))).sample(ordered, size))
