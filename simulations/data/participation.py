"""Participation processes: which clients are online in each round (Wang & Ji 2024, FedAU, section 5 and code)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Online = NDArray[np.bool_]
Probabilities = NDArray[np.float64]


class Participation(Protocol):
    """A process that determines, round by round, which clients are online."""

    def step(self) -> Online:
        """Advance by one round and return which clients are online in it, `[N]`."""


class Always:
    """All clients are online in every round."""

    def __init__(self, nodes: int) -> None:
        self._online: Online = np.ones(nodes, dtype=np.bool_)

    def step(self) -> Online:
        """Return all clients, `[N]`."""
        return self._online


class Bernoulli:
    """Each node is online with its probability, independently in each round."""

    def __init__(self, probabilities: Probabilities, rng: np.random.Generator) -> None:
        self._probabilities = probabilities
        self._rng = rng

    def step(self) -> Online:
        """Draw the clients that are online in the next round, `[N]`."""
        return self._rng.random(len(self._probabilities)) < self._probabilities


class Markov:
    """Each node is a two-state Markov chain whose stationary probability of being online is its probability `p`.

    An offline node goes online with probability `rate`; an online node goes offline with probability
    `rate * (1 / p - 1)`. Where the latter exceeds one, both are divided by it. The chain starts in its stationary
    distribution and makes one transition before each round.
    """

    def __init__(self, probabilities: Probabilities, rng: np.random.Generator, rate: float = 0.05) -> None:
        self.on, self.off = markov_rates(probabilities, rate)
        self._rng = rng
        self._online: Online = rng.random(len(probabilities)) < probabilities

    def step(self) -> Online:
        """Make one transition and return which clients are online, `[N]`."""
        changes = self._rng.random(len(self._online)) < np.where(self._online, self.off, self.on)
        self._online = self._online ^ changes
        return self._online


def markov_rates(probabilities: Probabilities, rate: float) -> tuple[Probabilities, Probabilities]:
    """Return the probabilities of going online and of going offline, `[N]` each; see `Markov`."""
    off = rate * (1 / probabilities - 1)
    excess = np.maximum(off, 1.0)
    return rate / excess, off / excess


class Cyclic:
    """Each node is online for one contiguous run of rounds in every `cycle`, with a random phase per node.

    The run has a whole number of rounds, at least one; so has the time offline.
    """

    def __init__(self, probabilities: Probabilities, rng: np.random.Generator, cycle: int = 100) -> None:
        self.active, self.inactive = cyclic_lengths(probabilities, cycle)
        self._rounds_left = rng.integers(0, self.inactive)
        self._online: Online = np.zeros(len(probabilities), dtype=np.bool_)

    def step(self) -> Online:
        """Toggle the nodes whose current run of rounds has ended, and return which are online, `[N]`."""
        toggles = self._rounds_left == 0
        self._online = self._online ^ toggles
        lengths = np.where(self._online, self.active, self.inactive)
        self._rounds_left = np.where(toggles, lengths, self._rounds_left) - 1
        return self._online


def cyclic_lengths(probabilities: Probabilities, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many rounds of each cycle a node is online, and how many offline, `[N]` each."""
    active = np.maximum(1, np.round(cycle * probabilities)).astype(np.int64)
    return active, np.maximum(1, cycle - active)


class Trace:
    """A recorded trace: one line of comma-separated 0 and 1 per round, one column per node.

    The trace repeats from its first line when it ends. Raises `ValueError` for a file that cannot be read, is empty,
    or does not have one column per node.
    """

    def __init__(self, path: Path, nodes: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns about an empty file, which is an error below
                table = np.loadtxt(path, delimiter=",", ndmin=2)
        except (OSError, ValueError) as error:
            problem = f"The trace file {path} cannot be read ({error}); give lines of 0 and 1, separated by commas."
            raise ValueError(problem) from None
        if not np.isin(table, (0, 1)).all():
            raise ValueError(f"The trace file {path} has numbers other than 0 and 1; give only these.")
        if not table.size:
            raise ValueError(f"The trace file {path} is empty; give one line of 0 and 1 per round.")
        if table.shape[1] != nodes:
            raise ValueError(
                f"The trace file {path} has {table.shape[1]} columns for {nodes} clients; give one per client."
            )
        self._table: Online = table > 0
        self._round = 0

    def step(self) -> Online:
        """Return the next line, `[N]`."""
        row: Online = self._table[self._round % len(self._table)]
        self._round += 1
        return row


def class_correlated(
    distributions: Probabilities,
    rng: np.random.Generator,
    alpha: float = 0.1,
    mean: float = 0.1,
    minimum: float = 0.02,
) -> Probabilities:
    """Return participation probabilities `[N]` that depend on the nodes' label distributions, `distributions [N, C]`.

    Draws a participation weight for each class from Dir(`alpha`); see `probabilities_of`.
    """
    class_weights = rng.dirichlet(np.full(distributions.shape[1], alpha))
    return probabilities_of(distributions, class_weights, mean, minimum)


def probabilities_of(
    distributions: Probabilities, class_weights: Probabilities, mean: float, minimum: float
) -> Probabilities:
    """Return `mean * C * <distribution, class_weights>` for each node, clipped to [`minimum`, 1], `[N]`."""
    classes = distributions.shape[1]
    probabilities: Probabilities = np.clip(mean * classes * (distributions @ class_weights), minimum, 1.0)
    return probabilities
