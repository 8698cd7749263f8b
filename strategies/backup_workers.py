"""How many replies a round should wait for: a policy of rounds, not a rule.

Xu, Neglia & Sebastianelli 2020, dynamic backup workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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
