"""The table `[participation]`: which clients are online in each round. Each kind has its own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

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
    cyclic_lengths,
)
from corymb.strategies.core.registry import Registry

PARTICIPATIONS: Registry[Any] = Registry("participation", {}, "corymb.participation")
ProcessAndProbabilities = tuple[
    Participation, Probabilities | None
]  # the process, and the clients' probabilities if it has any


class AlwaysSettings(Settings):
    """All clients are online in every round."""

    kind: Literal["always"] = "always"

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> ProcessAndProbabilities:
        """Return the process for clients with label distributions `labels [N, C]`."""
        return Always(len(labels)), None


class _Random(Settings):
    """Processes in which each client has a probability of being online.

    With `probability`, all clients have the same one. Without it, a client's probability depends on its classes: the
    weights of the classes follow Dir(`alpha`), and probabilities are scaled to `mean` and clipped to [`minimum`, 1].
    """

    probability: float | None = Field(None, gt=0, le=1)
    """The same probability of being online for all clients. Without it, each client's depends on its classes."""
    mean: float = Field(0.1, gt=0, le=1)
    """The mean of the probabilities that depend on classes, before they are clipped to [`minimum`, 1]."""
    minimum: float = Field(0.02, gt=0, le=1)
    """The smallest of these probabilities."""
    alpha: float = Field(0.1, gt=0)
    """The concentration of the classes' weights; a small one makes the probabilities more unequal."""

    @model_validator(mode="after")
    def _check(self) -> _Random:
        fields = _Random.model_fields
        ignored = [name for name in ("mean", "minimum", "alpha") if getattr(self, name) != fields[name].default]
        if self.probability is not None and ignored:
            raise ValueError(f"{ignored[0]} has no effect beside probability; remove one of them")
        return self

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> ProcessAndProbabilities:
        """Return the process for clients with label distributions `labels [N, C]`, and their probabilities `[N]`."""
        if self.probability is not None:
            probabilities = np.full(len(labels), self.probability)
        else:
            probabilities = class_correlated(labels, rng, self.alpha, self.mean, self.minimum)
        return self.process(probabilities, rng), probabilities

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """Return the process with these `probabilities [N]`."""
        raise NotImplementedError


class BernoulliSettings(_Random):
    """Each client is online independently in each round; see `Bernoulli`."""

    kind: Literal["bernoulli"] = "bernoulli"

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """See `Bernoulli`."""
        return Bernoulli(probabilities, rng)


class MarkovSettings(_Random):
    """Each client alternates between online and offline periods; it comes online with `rate`. See `Markov`."""

    kind: Literal["markov"] = "markov"
    rate: float = Field(0.05, gt=0, le=1)
    """The probability that an offline client comes online in the next round."""

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """See `Markov`."""
        return Markov(probabilities, rng, self.rate)


class CyclicSettings(_Random):
    """Each client is online for one contiguous run of rounds in every `cycle`; see `Cyclic`."""

    kind: Literal["cyclic"] = "cyclic"
    cycle: int = Field(100, ge=2)
    """The length of a cycle in rounds."""

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> ProcessAndProbabilities:
        """Return the process, and the clients' probabilities, which follow from whole rounds, `[N]`."""
        process, probabilities = super().make(labels, rng)
        assert probabilities is not None
        active, inactive = cyclic_lengths(probabilities, self.cycle)
        return process, active / (active + inactive)

    def process(self, probabilities: Probabilities, rng: np.random.Generator) -> Participation:
        """See `Cyclic`."""
        return Cyclic(probabilities, rng, self.cycle)


class TraceSettings(Settings):
    """The file at `path` has one line per round with a 0 or 1 per client; see `Trace`."""

    kind: Literal["trace"] = "trace"
    path: Path
    """The file: one line per round, with a 0 or 1 per client, separated by commas. It repeats from its start."""

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> ProcessAndProbabilities:
        """Return the process. Raises `ValueError` if the file cannot be read or does not have N columns."""
        return Trace(self.path, len(labels)), None


class CustomParticipation(CustomSettings):
    """A user's own class or function, given as "module:name" or by an entry point of group `corymb.participation`.

    `function(labels [N, C], rng, **options)` returns a `Participation`: an object whose `step()` returns which
    clients are online in the next round, `[N]` bool.
    """

    def make(self, labels: NDArray[np.float64], rng: np.random.Generator) -> ProcessAndProbabilities:
        """Return the process. Raises `ValueError` if the returned object has no method `step`."""
        made = self.call(PARTICIPATIONS, labels, rng)
        if not callable(getattr(made, "step", None)):
            raise ValueError(
                f"The participation {self.reference!r} returned a {type(made).__name__} without a method step()."
            )
        return made, None


KINDS = ("always", "bernoulli", "markov", "cyclic", "trace")
ParticipationSettings = Annotated[
    AlwaysSettings | BernoulliSettings | MarkovSettings | CyclicSettings | TraceSettings | CustomParticipation,
    Field(discriminator="kind"),
    BeforeValidator(with_kind("always", KINDS, PARTICIPATIONS)),
]
