"""Policies for the number of replies that a round waits for.

A policy is a frozen dataclass of settings. What it learns over rounds is a separate value.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from flwr.app import Message

from corymb.strategies import Model, Reply

L = TypeVar("L")  # the estimates of a policy: None, or a frozen dataclass of scalars, strings, tuples and tensors
L_co = TypeVar("L_co", covariant=True)


class Observer(Protocol[L_co]):
    """Observes the replies of one round for a policy."""

    def watch(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        """Yield `replies` unchanged and observe each."""

    def estimates(self, loss: float | None) -> L_co:
        """Return the estimates after the round. `loss` is the mean training loss, None if no client reports it."""


@dataclass(frozen=True)
class RoundSize(ABC, Generic[L]):
    """A policy that decides before each round for how many replies the round waits."""

    def initial(self) -> L:
        """Return the policy's estimates before the first round."""
        return None  # type: ignore[return-value]  # correct for every policy that learns nothing

    @abstractmethod
    def choose(self, requested: int, estimates: L) -> tuple[int, L]:
        """Return the number of replies to wait for, from 1 to `requested`, and the new estimates."""

    def observer(self, estimates: L, origin: Model) -> Observer[L] | None:
        """Return an observer of the replies to `origin`; None if the policy does not learn from replies."""
        return None

    def after(self, seconds: Sequence[float], estimates: L) -> L:
        """Return the estimates after a round whose replies arrived `seconds` after the requests."""
        return estimates


@dataclass(frozen=True)
class WaitForShare(RoundSize[None]):
    """Wait for a fixed `share` of the sampled clients (static backup workers)."""

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; use a value in (0, 1], such as 0.8 to wait for 4 of 5 replies.")

    def choose(self, requested: int, estimates: None) -> tuple[int, None]:
        """See `RoundSize.choose`."""
        return max(1, round(self.share * requested)), None


@dataclass
class ArrivalTimes:
    """The times at which the replies of a phase arrive, in seconds after the phase began. Errors are not counted.

    In a deployment, `known` are these times, which may include some from before a restart; else None.
    """

    known: Sequence[float] | None = None
    started: float = field(default_factory=time.monotonic)
    measured: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> Sequence[float]:
        """The times of the replies so far."""
        return self.measured if self.known is None else self.known

    def watch(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Yield `replies` unchanged and record their times."""
        for reply in replies:
            if not reply.has_error():
                self.measured.append(time.monotonic() - self.started)
            yield reply
            del reply
