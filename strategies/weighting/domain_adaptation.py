"""Updates of sources beside that of the target site, which alone matters; and how far each source is to be believed.

Jiang, Zhang & Koyejo 2024, sections 3 and 4.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive, share

STEPS = "steps"  # the metric that counts a site's batches


class Adaptation(NamedTuple):
    """The `target [P]` update, the `sources [N, P]` on the target's scale, and the target's `batches [S, P]`."""

    target: Tensor
    sources: Tensor
    batches: Tensor | None


def adaptation(cohort: Cohort, target: str, rate_ratio: float, align: bool) -> Adaptation | None:
    """Take a round apart, in float64; None when the target did not reply.

    With `align` a source's update is divided by its number of batches and multiplied by the target's, where both
    report them, and by `rate_ratio`, the target's learning rate over the sources'.
    """
    if target not in cohort.nodes:
        return None
    row = cohort.nodes.index(target)
    updates = cohort.models.double() - cohort.origin.double()
    scale = torch.full((len(updates), 1), float(rate_ratio) if align else 1.0, dtype=torch.float64)
    if align and STEPS in cohort.metrics:
        counts = cohort.metrics[STEPS].clamp(min=1)
        scale *= (counts[row] / counts).nan_to_num(nan=1.0)[:, None]
    others = [i for i in range(len(updates)) if i != row]
    batches = cohort.steps.get(target)
    return Adaptation(updates[row], (updates * scale)[others], None if batches is None else batches.double())


class Trust(NamedTuple):
    """How much of each source to take, in [0, 1], `[N]` each: added as it is, projected, and projected with
    an allowance for batches that point away from the source.
    """

    added: Tensor
    projected: Tensor
    allowed: Tensor


def trust(adapted: Adaptation, default: float = 0.5) -> Trust:
    """The weights of least error (their Eq. 3), from the variance over the target's batches.

    Fewer than two batches say nothing about variance: all weights are `default` then.
    """
    steps = adapted.batches
    if steps is None or len(steps) < 2:
        same = torch.full((len(adapted.sources),), default, dtype=torch.float64)
        return Trust(same, same, same)
    count = len(steps)
    sources = adapted.sources / count  # on the scale of one batch
    mean = steps.mean(dim=0)
    spread = (steps - mean).square().sum() / (count - 1)
    variance = spread / count
    units = _units(sources)
    along = steps @ units.T  # [S, N]
    rest = mean - along.mean(dim=0)[:, None] * units  # of the mean, across each source, [N, P]
    distance = (sources - mean).square().sum(dim=1) - variance
    across = rest.square().sum(dim=1) - (spread - along.var(dim=0)) / count
    towards = 1 - (1 - (along > 0).double().mean(dim=0)) / count
    length = mean.square().sum()
    missed = towards * across.clamp(min=0) + (1 - towards) * length
    return Trust(*(_share(variance, error.clamp(min=0), length) for error in (distance, across, missed)))


def _share(variance: Tensor, error: Tensor, length: Tensor) -> Tensor:
    """The share that the variance has of the error; one where both are nothing beside the squared `length`."""
    total = error + variance
    return torch.where(total > 1e-14 * length, variance / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)


def _units(vectors: Tensor) -> Tensor:
    """Vectors of length one; zero stays zero."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)


def projections(target: Tensor, sources: Tensor) -> Tensor:
    """The part of `target [P]` along each of `sources [N, P]`; zero where it points the other way."""
    units = _units(sources)
    return (units @ target).clamp(min=0)[:, None] * units


def cosine_projections(target: Tensor, sources: Tensor) -> Tensor:
    """The official code's stand-in: each source times its cosine with the target, where positive."""
    (unit,) = _units(target[None])
    cosines: Tensor = _units(sources) @ unit
    return cosines.clamp(min=0)[:, None] * sources


@dataclass(frozen=True)
class TargetRule(SightedRule[int]):
    """Moves the model for the sake of one site, `target`, with the help of the others, the sources.

    `beta` is the sources' part; `auto` finds one for each source, from the updates of the target's single batches,
    which it sends with the setting `train.batch_updates`. With `align` a source's update is brought to the scale of the
    target's, by the numbers of their batches and by `rate_ratio`, the target's learning rate over the sources'.
    The first `warm` rounds average the sources alone. A round without the target changes nothing, and its note "target"
    is 0; the memory counts rounds. Sources are believed to be honest.
    """

    unanimous = False  # sources are brought to the target's scale

    target: str
    beta: float = 0.5
    auto: bool = False
    rate_ratio: float = 1.0
    align: bool = True
    warm: int = 0

    def __post_init__(self) -> None:
        share(beta=self.beta)
        positive(rate_ratio=self.rate_ratio)
        at_least(0, warm=self.warm)

    def initial(self) -> int:
        """No round yet."""
        return 0

    def wants_steps(self, node: str) -> bool:
        """Of the target."""
        return node == self.target

    @abstractmethod
    def step(self, adapted: Adaptation, trusted: Trust, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Where to go, `[P]`, and the sources' parts, `[N]`; there is a source."""

    @final
    def mix(self, cohort: Cohort, memory: int) -> Mix[int]:
        """The origin moved by `step`; without sources by the target's update."""
        sources = torch.tensor([node != self.target for node in cohort.nodes])
        if memory < self.warm and sources.any():
            weights = cohort.shares * sources / (cohort.shares * sources).sum()
            return Mix(cohort.mixed(weights), memory + 1, weights)
        found = adaptation(cohort, self.target, self.rate_ratio, self.align)
        notes = {"target": float(found is not None)}
        if found is None:
            return Mix(cohort.origin, memory, notes=notes)
        if not len(found.sources):
            return Mix(cohort.origin + found.target, memory + 1, notes=notes)
        constant = found.target.new_full((len(found.sources),), self.beta)
        moved, betas = self.step(found, trust(found) if self.auto else Trust(constant, constant, constant), cohort)
        return Mix(cohort.origin + moved, memory + 1, notes=notes | {"beta": float(betas.mean())})
