"""The table `[participation]`: which clients are online in each round. Each kind has keys of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from corymb.protocol.settings import Settings
from corymb.simulations.data.kinds import CustomSettings, with_kind
from corymb.simulations.data.participation import (
    Always,
    Bernoulli,
    Cyclic,
    Markov,
    Participation,
    Probabilities,
    Trace,
    class_correlated,
)
from corymb.strategies.core.registry import Registry

PARTICIPATIONS: Registry[Any] = Registry("participation", {}, "corymb.participation")
Made = tuple[Participation, Probabilities | None]  # the process, and the clients' probabilities where it has any


class AlwaysSettings(Settings):
    """All clients are online in every round."""

    kind: Literal["always"] = "always"

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> Made:
        """The process for clients with label distributions `labels [N, C]`."""
        return Always(len(labels)), None


class _Random(Settings):
    """Each client has a probability of being online: the same `probability` for all or, without it, one that follows
    from its classes, with this `mean`, this `minimum`, and classes that differ as Dir(`alpha`) has it.
    """

    probability: float | None = Field(None, gt=0, le=1)
    mean: float = Field(0.1, gt=0, le=1)
    minimum: float = Field(0.02, gt=0, le=1)
    alpha: float = Field(0.1, gt=0)

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> Made:
        """The process for clients with label distributions `labels [N, C]`, and their probabilities `[N]`."""
        if self.probability is not None:
            probabilities = np.full(len(labels), self.probability)
        else:
            probabilities = class_correlated(labels, rng, self.alpha, self.mean, self.minimum)
        return self.process(probabilities, rng), probabilities

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """The process with these probabilities."""
        raise NotImplementedError


class BernoulliSettings(_Random):
    """Independently in each round."""

    kind: Literal["bernoulli"] = "bernoulli"

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """See `Bernoulli`."""
        return Bernoulli(probabilities, rng)


class MarkovSettings(_Random):
    """For a while: an offline client comes online at `rate`."""

    kind: Literal["markov"] = "markov"
    rate: float = Field(0.05, gt=0, le=1)

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """See `Markov`."""
        return Markov(probabilities, rng, self.rate)


class CyclicSettings(_Random):
    """For one stretch of every `cycle` rounds."""

    kind: Literal["cyclic"] = "cyclic"
    cycle: int = Field(100, ge=2)

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """See `Cyclic`."""
        return Cyclic(probabilities, rng, self.cycle)


class TraceSettings(Settings):
    """As the file at `path` says: a line per round, a 0 or 1 per client."""

    kind: Literal["trace"] = "trace"
    path: Path

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> Made:
        """The process. Raises `ValueError` for a file that cannot be read or has other clients."""
        return Trace(self.path, len(labels)), None


class CustomParticipation(CustomSettings):
    """A class or function of the user's own: `function(labels [N, C], rng, **options)` returns a `Participation`: any
    object whose `step()` gives the next round's clients, `[N]` of bool. The entry-point group is
    `corymb.participation`.
    """

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> Made:
        """The process. Raises `ValueError` for an object without `step`."""
        made = PARTICIPATIONS.find(self.reference)(labels, rng, **self.options)
        if not callable(getattr(made, "step", None)):
            raise ValueError(f"The participation {self.reference!r} gave a {type(made).__name__} without step().")
        return made, None


KINDS = ("always", "bernoulli", "markov", "cyclic", "trace")
ParticipationSettings = Annotated[
    AlwaysSettings | BernoulliSettings | MarkovSettings | CyclicSettings | TraceSettings | CustomParticipation,
    Field(discriminator="kind"),
    BeforeValidator(with_kind("always", KINDS, PARTICIPATIONS)),
]
