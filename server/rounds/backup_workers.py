"""Dynamic backup workers: a round waits for the number of replies with the largest loss decrease per second.

Source: Xu, Neglia & Sebastianelli 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor

from corymb.server.rounds.round_size import RoundSize
from corymb.strategies import Model, Reply
from corymb.strategies.core.rows import CHUNK
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class Gradients:
    """Statistics of a round's gradients, both >= 0.

    `variance` is the variance of a single gradient, `length` the squared norm of the expected gradient.
    """

    variance: float
    squared_norm: float

    @classmethod
    def of(cls, squares: float, mean_square: float, count: int, variance: float | None = None) -> Gradients | None:
        """Estimate the statistics of `count` gradients.

        `squares` is the sum of their squared norms, `mean_square` the squared norm of their mean. The variance cannot
        be estimated from a single gradient, so `variance`, an earlier estimate, is used for it. Returns None if the
        variance is unknown or `count` is 0.
        """
        if count > 1:
            variance = max(0.0, (squares - count * mean_square) / (count - 1))
        if variance is None or not count:
            return None
        return cls(variance, max(0.0, mean_square - variance / count))

    @classmethod
    def of_rows(cls, gradients: Tensor) -> Gradients | None:
        """Estimate the statistics of `gradients [K, P]`."""
        rows = gradients.double()
        return cls.of(float(rows.square().sum()), float(rows.mean(dim=0).square().sum()), len(rows))


def smoothness(gradients: Gradients, count: int, rate: float, decrease: float) -> float:
    """Return the smoothness L >= 0 of the loss.

    L is such that a step of size `rate` along the mean of `count` gradients lowers the loss by `decrease`.
    """
    expected = gradients.squared_norm + gradients.variance / count
    return max(0.0, 2 * (rate * gradients.squared_norm - decrease) / (rate**2 * expected)) if expected else 0.0


def gains(gradients: Gradients, smooth: float, rate: float, clients: int) -> list[float]:
    """Return the expected decrease of the loss after a step along the mean of 1, 2, ..., `clients` gradients.

    `smooth` is the smoothness L of the loss, `rate` the size of the step.
    """
    noiseless = (rate - smooth * rate**2 / 2) * gradients.squared_norm
    return [noiseless - smooth * rate**2 * gradients.variance / (2 * count) for count in range(1, clients + 1)]


def replies_to_wait_for(expected: Sequence[float], times: Sequence[float]) -> int:
    """Return the number of replies with the largest expected gain per second.

    `expected[k - 1]` is the gain of k replies, `times[k - 1]` the expected time of the k-th reply in seconds. Returns
    the number of all replies if no gain is positive, or if all replies are expected at the same time.
    """
    if max(expected) <= 0:
        return len(expected)
    latest = accumulate(times, max)
    gain_rates = [gain / max(time, 1e-12) for gain, time in zip(expected, latest, strict=True)]
    best = max(gain_rates)
    return max(k for k, rate in enumerate(gain_rates, 1) if rate >= best)


@dataclass(frozen=True)
class Estimates:
    """The estimates that `DynamicBackupWorkers` carries from round to round.

    `times[k - 1]` is the mean time of the k-th reply in seconds, over the `rounds[k - 1]` rounds that had a k-th
    reply. `smoothness` holds the latest estimates of the smoothness L, and `loss` is the training loss of the last
    round.
    """

    gradients: Gradients | None = None
    count: int = 0  # replies in the last aggregation
    smoothness: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()
    waited_for: int = 0  # number of replies that the last round waited for
    loss: float | None = None
    loss_rose: bool = False  # whether the loss rose in the last round

    def time(self, place: int) -> float:
        """Return the expected time in seconds of the reply at `place`, counted from 1; 0.0 before the first round.

        A place beyond all measured ones has the time of the last measured one.
        """
        return self.times[min(place, len(self.times)) - 1] if self.times else 0.0


@dataclass(frozen=True)
class DynamicBackupWorkers(RoundSize[Estimates]):
    """Wait for the number of replies with the largest loss decrease per second (Xu, Neglia & Sebastianelli 2020).

    An update divided by `rate` (the local learning rate times the number of steps) counts as a gradient. The policy
    estimates the gain of k replies from the variance of the gradients, from the mean time of the k-th reply, and from
    the smoothness of the loss, which it averages over the last `window` rounds. It waits for all replies at first and
    if no gain is positive. If the loss rose, it waits for at least one reply more than in the last round. During a
    round, it keeps its own sum of updates, which takes the memory of two models.
    """

    rate: float = 1.0
    window: int = 5

    def __post_init__(self) -> None:
        positive(rate=self.rate)
        at_least(1, window=self.window)

    def initial(self) -> Estimates:
        """Return empty estimates."""
        return Estimates()

    def choose(self, requested: int, estimates: Estimates) -> tuple[int, Estimates]:
        """See `RoundSize.choose`."""
        chosen = requested
        if estimates.gradients is not None and estimates.smoothness:
            expected = gains(estimates.gradients, fmean(estimates.smoothness), self.rate, requested)
            chosen = replies_to_wait_for(expected, [estimates.time(k) for k in range(1, requested + 1)])
        if estimates.loss_rose:
            chosen = max(chosen, estimates.waited_for + 1)
        chosen = min(chosen, requested)
        return chosen, replace(estimates, waited_for=chosen)

    def observer(self, estimates: Estimates, origin: Model) -> GradientSums:
        """See `RoundSize.observer`."""
        return GradientSums(self, estimates, origin)

    def after(self, seconds: Sequence[float], estimates: Estimates) -> Estimates:
        """See `RoundSize.after`."""
        times, rounds = list(estimates.times), list(estimates.rounds)
        for place, time in enumerate(sorted(seconds)):
            if place == len(times):
                times.append(0.0)
                rounds.append(0)
            rounds[place] += 1
            times[place] += (time - times[place]) / rounds[place]
        return replace(estimates, times=tuple(times), rounds=tuple(rounds))


@dataclass
class GradientSums:
    """Observer of one round: the sum of its gradients (`total [P]`) and the sum of their squared norms (`squares`).

    `before` holds the estimates before the round, `origin` the model that the clients received.
    """

    policy: DynamicBackupWorkers
    before: Estimates
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

    def estimates(self, loss: float | None) -> Estimates:
        """See `Observer.estimates`."""
        before, smooth = self.before, self.before.smoothness
        has_both = loss is not None and before.loss is not None
        decrease = (before.loss or 0.0) - (loss or 0.0)
        if has_both and before.gradients is not None and before.count:
            newest = smoothness(before.gradients, before.count, self.policy.rate, decrease)
            smooth = (*smooth, newest)[-self.policy.window :]
        gradients, count = before.gradients, before.count
        if self.count:
            mean_square = float((self.total / self.count).square().sum())
            variance = gradients.variance if gradients else None
            gradients = Gradients.of(self.squares, mean_square, self.count, variance) or gradients
            count = self.count
        return replace(
            before, gradients=gradients, count=count, smoothness=smooth, loss=loss, loss_rose=has_both and decrease < 0
        )
