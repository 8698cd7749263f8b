"""How many replies a round waits for: settings in a frozen dataclass, what is learnt over rounds as a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from corymb.strategies import Model, Reply

L = TypeVar("L")  # what a policy learns: None, or a frozen dataclass of scalars, strings, tuples and tensors
L_co = TypeVar("L_co", covariant=True)


class Observer(Protocol[L_co]):
    """Looks at one round's replies for a policy."""

    def watch(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        """The same replies, looked at as they pass."""

    def learnt(self, loss: float | None) -> L_co:
        """What is known after the round, with the mean training `loss` where sites report one."""


@dataclass(frozen=True)
class RoundSize(ABC, Generic[L]):
    """Decides before each round how many replies it waits for."""

    def initial(self) -> L:
        """What is known before the first round."""
        return None  # type: ignore[return-value]  # right for every policy that learns nothing

    @abstractmethod
    def choose(self, requested: int, learnt: L) -> tuple[int, L]:
        """How many replies of `asked` sites to wait for, one at least, and what is known from then on."""

    def observer(self, learnt: L, origin: Model) -> Observer[L] | None:
        """What looks at the replies to `origin`, if the policy learns from them."""
        return None

    def after(self, seconds: Sequence[float], learnt: L) -> L:
        """What is known after the round's replies came so many `seconds` after the requests."""
        return learnt


@dataclass(frozen=True)
class WaitForShare(RoundSize[None]):
    """A fixed `share` of the sampled sites: static backup workers."""

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share = {self.share} must lie in (0, 1]; 0.8 waits for four replies of five.")

    def choose(self, requested: int, learnt: None) -> tuple[int, None]:
        """See `RoundSize.choose`."""
        return max(1, round(self.share * requested)), None
