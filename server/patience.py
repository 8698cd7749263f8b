"""How many replies a round waits for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from corymb.strategies import Model, Reply
from corymb.strategies.backup_workers import Gradients, gains, replies_to_wait_for, smoothness
from corymb.strategies.fold import BLOCK


class Patience(ABC):
    """Decides before each round how many replies it waits for, and learns from what came."""

    @abstractmethod
    def enough(self, asked: int) -> int:
        """How many replies of `asked` sites to wait for, one at least."""

    def watch(self, origin: Model, replies: Iterator[Reply]) -> Iterator[Reply]:
        """Look at `replies` to `origin` as they pass."""
        return replies

    def after(self, seconds: Sequence[float], loss: float | None) -> None:  # noqa: B027  # most policies learn nothing
        """Learn when each reply of the round came, and the mean training `loss` where sites report one."""


@dataclass
class WaitForShare(Patience):
    """A fixed share of the sites that were asked: static backup workers."""

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share = {self.share} must lie in (0, 1]; 0.8 waits for four replies of five.")

    def enough(self, asked: int) -> int:
        """See `Patience.enough`."""
        return max(1, round(self.share * asked))


@dataclass
class DynamicBackupWorkers(Patience):
    """Xu, Neglia & Sebastianelli 2020: as many replies as lower the loss most per second.

    Updates over `rate` (the local learning rate times the steps) are taken for gradients; their variance, the
    smoothness that the falling loss shows over `window` rounds, and the mean time at which the k-th reply came,
    say what k replies are worth. Waits for all at first, when nothing can be gained, and for one more than
    before when the loss rose. Keeps a sum of updates of its own while a round lasts: two models of memory.
    """

    rate: float = 1.0
    window: int = 5
    _count: int = field(default=0, init=False)
    _counted: int = field(default=0, init=False)  # in the step before
    _squares: float = field(default=0.0, init=False)
    _sum: Tensor | None = field(default=None, init=False)
    _gradients: Gradients | None = field(default=None, init=False)
    _smooth: deque[float] = field(init=False)
    _times: dict[int, list[float]] = field(default_factory=dict, init=False)
    _last: tuple[int, float | None] = field(default=(0, None), init=False)  # replies waited for, loss
    _rose: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.window < 1:
            raise ValueError(f"rate = {self.rate} must be positive and window = {self.window} at least 1.")
        self._smooth = deque(maxlen=self.window)

    def enough(self, asked: int) -> int:
        """See `Patience.enough`."""
        chosen = asked
        if self._gradients is not None and self._smooth:
            expected = gains(self._gradients, fmean(self._smooth), self.rate, asked)
            chosen = replies_to_wait_for(expected, [self._time(k) for k in range(1, asked + 1)])
        if self._rose:
            chosen = max(chosen, self._last[0] + 1)
        chosen = min(chosen, asked)
        self._last = (chosen, self._last[1])
        return chosen

    def watch(self, origin: Model, replies: Iterator[Reply]) -> Iterator[Reply]:
        """Sum up the gradients of a round."""
        self._count, self._squares = 0, 0.0
        self._sum = torch.zeros(origin.parameters.numel(), dtype=torch.float64)
        for reply in replies:
            start = 0
            for piece in (block for part in reply.parts for block in part.split(BLOCK)):
                stop = start + piece.numel()
                gradient = (origin.parameters[start:stop] - piece).double() / self.rate
                self._sum[start:stop] += gradient
                self._squares += float(gradient.square().sum())
                start = stop
            self._count += 1
            yield reply

    def after(self, seconds: Sequence[float], loss: float | None) -> None:
        """See `Patience.after`."""
        before = self._last[1]
        self._rose = loss is not None and before is not None and loss > before
        if loss is not None and before is not None and self._gradients is not None and self._counted:
            self._smooth.append(smoothness(self._gradients, self._counted, self.rate, before - loss))
        if self._sum is not None and self._count:
            mean_square = float((self._sum / self._count).square().sum())
            variance = self._gradients.variance if self._gradients else None
            self._gradients = Gradients.of(self._squares, mean_square, self._count, variance) or self._gradients
            self._counted = self._count
        self._sum = None
        for place, time in enumerate(sorted(seconds), 1):
            self._times.setdefault(place, []).append(time)
        self._last = (self._last[0], loss)

    def _time(self, place: int) -> float:
        """When the reply of this place is expected; a place never seen is as late as the latest that was."""
        known = [k for k in self._times if k <= place]
        return fmean(self._times[max(known)]) if known else 0.0
