"""Updates of sources beside that of the target site, which alone matters; and how far each source is to be believed.

Jiang, Zhang & Koyejo 2024, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from corymb.strategies.cohort import Cohort

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
    distance = torch.cdist(sources, steps).square().mean(dim=1) - spread
    units = _units(sources)
    along = steps @ units.T  # [S, N]
    rests = steps[:, None] - along[..., None] * units  # [S, N, P]
    rest_spread = (rests - rests.mean(dim=0)).square().sum(dim=(0, 2)) / (count - 1)
    across = rests.square().sum(dim=2).mean(dim=0) - rest_spread
    towards = 1 - (1 - (along > 0).double().mean(dim=0)) / count
    distance, across = distance.clamp(min=0), across.clamp(min=0)
    missed = towards * across + (1 - towards) * mean.square().sum()
    return Trust(*(_share(variance, error) for error in (distance, across, missed)))


def _share(variance: Tensor, error: Tensor) -> Tensor:
    total = error + variance
    return torch.where(total > 0, variance / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)


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


def adapted(
    cohort: Cohort, target: str, rate_ratio: float, align: bool, step: Callable[[Adaptation, dict[str, float]], Tensor]
) -> Tensor:
    """The next parameters `[P]`: the origin moved by `step`; without sources by the target, without the target not."""
    found = adaptation(cohort, target, rate_ratio, align)
    if found is None:
        return cohort.origin
    return cohort.origin + (step(found, cohort.notes) if len(found.sources) else found.target)
