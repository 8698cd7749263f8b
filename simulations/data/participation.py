"""Who is online in each round: the processes of Wang & Ji 2024 (FedAU), section 5 and their code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Online = NDArray[np.bool_]
Probabilities = NDArray[np.float64]


class Participation(Protocol):
    """A process over rounds."""

    def step(self) -> Online:
        """Which clients are online in the next round, `[N]`."""


class Always:
    """All clients are online in every round."""

    def __init__(self, nodes: int) -> None:
        self._online: Online = np.ones(nodes, dtype=np.bool_)

    def step(self) -> Online:
        """All of them."""
        return self._online


class Bernoulli:
    """Each node is online with its probability, independently in each round."""

    def __init__(self, probabilities: Probabilities, rng: np.random.Generator) -> None:
        self._probabilities = probabilities
        self._rng = rng

    def step(self) -> Online:
        """Toss every coin."""
        return self._rng.random(len(self._probabilities)) < self._probabilities


class Markov:
    """Each node is a two-state chain with its probability as the stationary one.

    Off to on with `rate`, on to off with `rate * (1 / p - 1)`; where that exceeds one, both are
    divided by it. It begins stationary and makes a transition before each round.
    """

    def __init__(self, probabilities: Probabilities, rng: np.random.Generator, rate: float = 0.05) -> None:
        self.on, self.off = markov_rates(probabilities, rate)
        self._rng = rng
        self._online: Online = rng.random(len(probabilities)) < probabilities

    def step(self) -> Online:
        """Make one transition."""
        changes = self._rng.random(len(self._online)) < np.where(self._online, self.off, self.on)
        self._online = self._online ^ changes
        return self._online


def markov_rates(probabilities: Probabilities, rate: float) -> tuple[Probabilities, Probabilities]:
    """The probabilities of going online and of going offline."""
    off = rate * (1 / probabilities - 1)
    excess = np.maximum(off, 1.0)
    return rate / excess, off / excess


class Cyclic:
    """Each node is online for a run of rounds out of every `cycle`, starting at its own random time."""

    def __init__(self, probabilities: Probabilities, rng: np.random.Generator, cycle: int = 100) -> None:
        self.active, self.inactive = cyclic_lengths(probabilities, cycle)
        self._left = rng.integers(0, self.inactive)
        self._online: Online = np.zeros(len(probabilities), dtype=np.bool_)

    def step(self) -> Online:
        """Toggle the nodes whose time has run out, and count a round down."""
        toggles = self._left == 0
        self._online = self._online ^ toggles
        fresh = np.where(self._online, self.active, self.inactive)
        self._left = np.where(toggles, fresh, self._left) - 1
        return self._online


def cyclic_lengths(probabilities: Probabilities, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many rounds each node is online, and offline, in turn."""
    active = np.maximum(1, np.round(cycle * probabilities)).astype(np.int64)
    return active, np.maximum(1, cycle - active)


class Trace:
    """What a file says: a line of comma-separated 0 and 1 per round, a column per node; it starts over at its end."""

    def __init__(self, path: Path, nodes: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an empty file, which is told below
                table = np.loadtxt(path, delimiter=",", ndmin=2)
        except (OSError, ValueError) as error:
            raise ValueError(f"The trace file {path} cannot be read ({error}); give lines of 0 and 1.") from None
        if not table.size:
            raise ValueError(f"The trace file {path} is empty; give a line of 0 and 1 per round.")
        if table.shape[1] != nodes:
            raise ValueError(f"The trace {path} has {table.shape[1]} columns for {nodes} clients; give one per client.")
        self._table: Online = table > 0
        self._round = 0

    def step(self) -> Online:
        """The next line."""
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
    """Probabilities `[N]` that depend on each node's label distribution, `distributions [N, C]`.

    Draws how willing each class is from Dir(`alpha`), scales to `mean` and bounds to [`minimum`, 1].
    """
    willing = rng.dirichlet(np.full(distributions.shape[1], alpha))
    return probabilities_of(distributions, willing, mean, minimum)


def probabilities_of(
    distributions: Probabilities, willing: Probabilities, mean: float, minimum: float
) -> Probabilities:
    """`mean * C * <distribution, willing>` for each node, within [`minimum`, 1]."""
    classes = distributions.shape[1]
    probabilities: Probabilities = np.clip(mean * classes * (distributions @ willing), minimum, 1.0)
    return probabilities
