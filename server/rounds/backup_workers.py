"""Dynamic backup workers: a round waits for as many replies as lower the loss most per second.

Xu, Neglia & Sebastianelli 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from corymb.server.rounds.round_size import RoundSize
from corymb.strategies import Model, Reply
from corymb.strategies.core.rows import CHUNK
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class Gradients:
    """Of the round's gradients: the `variance` of one and the squared `length` of the expected one, both >= 0."""

    variance: float
    length: float

    @classmethod
    def of(cls, squares: float, mean_square: float, count: int, variance: float | None = None) -> Gradients | None:
        """From `squares`, the sum of the squared lengths of `count` gradients, and that of their mean.

        A single one says nothing about variance: that of before is taken, and None is returned without.
        """
        if count > 1:
            variance = max(0.0, (squares - count * mean_square) / (count - 1))
        if variance is None or not count:
            return None
        return cls(variance, max(0.0, mean_square - variance / count))

    @classmethod
    def of_rows(cls, gradients: Tensor) -> Gradients | None:
        """From the gradients `[K, P]`."""
        rows = gradients.double()
        return cls.of(float(rows.square().sum()), float(rows.mean(dim=0).square().sum()), len(rows))


def smoothness(gradients: Gradients, count: int, rate: float, decrease: float) -> float:
    """L, such that a step of `rate` along `count` gradients' mean lowered the loss by `decrease`; 0 or more."""
    expected = gradients.length + gradients.variance / count
    return max(0.0, 2 * (rate * gradients.length - decrease) / (rate**2 * expected)) if expected else 0.0


def gains(gradients: Gradients, smooth: float, rate: float, clients: int) -> list[float]:
    """By how much the loss is expected to fall with the first 1, 2, ..., `clients` gradients."""
    flat = (rate - smooth * rate**2 / 2) * gradients.length
    return [flat - smooth * rate**2 * gradients.variance / (2 * count) for count in range(1, clients + 1)]


def replies_to_wait_for(expected: Sequence[float], times: Sequence[float]) -> int:
    """How many replies gain most per second; all of them when none gains anything, or when all come together.

    `times[k - 1]` is when the k-th reply is expected, in seconds.
    """
    if max(expected) <= 0:
        return len(expected)
    steady = [max(times[: k + 1]) for k in range(len(times))]
    rates = [gain / max(time, 1e-12) for gain, time in zip(expected, steady, strict=True)]
    best = max(rates)
    return max(k for k, rate in enumerate(rates, 1) if rate >= best)


@dataclass(frozen=True)
class Learnt:
    """What `DynamicBackupWorkers` knows.

    The k-th reply of a round came `times[k - 1]` in the mean of `rounds[k - 1]`.
    """

    gradients: Gradients | None = None
    count: int = 0  # replies in the last step
    smooth: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()
    waited: int = 0  # replies waited for in the last round
    loss: float | None = None
    rose: bool = False  # the loss, in the last round

    def time(self, place: int) -> float:
        """When the reply of this place is expected; a place never seen is as late as the latest that was."""
        return self.times[min(place, len(self.times)) - 1] if self.times else 0.0


@dataclass(frozen=True)
class DynamicBackupWorkers(RoundSize[Learnt]):
    """Xu, Neglia & Sebastianelli 2020: as many replies as lower the loss most per second.

    Updates over `rate` (the local learning rate times the steps) are taken for gradients; their variance, the
    smoothness that the falling loss shows over `window` rounds, and the mean time at which the k-th reply came,
    tell what k replies gain. Waits for all at first, when nothing can be gained, and for one more than before when
    the loss rose. Keeps a sum of updates of its own while a round lasts: two models of memory.
    """

    rate: float = 1.0
    window: int = 5

    def __post_init__(self) -> None:
        positive(rate=self.rate)
        at_least(1, window=self.window)

    def initial(self) -> Learnt:
        """Nothing yet."""
        return Learnt()

    def choose(self, requested: int, learnt: Learnt) -> tuple[int, Learnt]:
        """See `RoundSize.choose`."""
        chosen = requested
        if learnt.gradients is not None and learnt.smooth:
            expected = gains(learnt.gradients, fmean(learnt.smooth), self.rate, requested)
            chosen = replies_to_wait_for(expected, [learnt.time(k) for k in range(1, requested + 1)])
        if learnt.rose:
            chosen = max(chosen, learnt.waited + 1)
        chosen = min(chosen, requested)
        return chosen, replace(learnt, waited=chosen)

    def observer(self, learnt: Learnt, origin: Model) -> GradientSums:
        """See `RoundSize.observer`."""
        return GradientSums(self, learnt, origin)

    def after(self, seconds: Sequence[float], learnt: Learnt) -> Learnt:
        """See `RoundSize.after`."""
        times, rounds = list(learnt.times), list(learnt.rounds)
        for place, time in enumerate(sorted(seconds)):
            if place == len(times):
                times.append(0.0)
                rounds.append(0)
            rounds[place] += 1
            times[place] += (time - times[place]) / rounds[place]
        return replace(learnt, times=tuple(times), rounds=tuple(rounds))


@dataclass
class GradientSums:
    """The sums of one round's gradients, and of their squares."""

    policy: DynamicBackupWorkers
    before: Learnt
    origin: Model
    count: int = 0
    squares: float = 0.0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.origin.parameters.numel(), dtype=torch.float64)

    def watch(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        """See `Observer.watch`."""
        for reply in replies:
            start = 0
            for piece in (block for part in reply.parts for block in part.split(CHUNK)):
                stop = start + piece.numel()
                gradient = (self.origin.parameters[start:stop] - piece).double() / self.policy.rate
                self.total[start:stop] += gradient
                self.squares += float(gradient.square().sum())
                start = stop
            self.count += 1
            yield reply

    def learnt(self, loss: float | None) -> Learnt:
        """See `Observer.learnt`."""
        before, smooth = self.before, self.before.smooth
        known = loss is not None and before.loss is not None
        decrease = (before.loss or 0.0) - (loss or 0.0)
        if known and before.gradients is not None and before.count:
            newest = smoothness(before.gradients, before.count, self.policy.rate, decrease)
            smooth = (*smooth, newest)[-self.policy.window :]
        gradients, count = before.gradients, before.count
        if self.count:
            mean_square = float((self.total / self.count).square().sum())
            variance = gradients.variance if gradients else None
            gradients = Gradients.of(self.squares, mean_square, self.count, variance) or gradients
            count = self.count
        return replace(before, gradients=gradients, count=count, smooth=smooth, loss=loss, rose=known and decrease < 0)
