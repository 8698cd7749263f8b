"""Federated domain adaptation: source clients help to train a model for one target client.

Source: Jiang, Zhang & Koyejo 2024, sections 3 and 4. FedDA and FedGP build on this module.
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

STEPS_METRIC = "steps"  # the metric with a client's number of batches


class RoundUpdates(NamedTuple):
    """The updates of one round, in float64.

    `target [P]` is the target's update and `sources [N, P]` are the sources' updates, on the target's scale.
    `batches [S, P]` are the updates of the target's single batches, or None.
    """

    target: Tensor
    sources: Tensor
    batches: Tensor | None


def round_updates(cohort: Cohort, target: str, rate_ratio: float, align: bool) -> RoundUpdates | None:
    """Return the target's and the sources' updates in this round, or None if the target did not reply.

    `align` multiplies a source's update by `rate_ratio`, the target's learning rate over the sources'. If both
    clients report their numbers of batches, it also multiplies by the target's number and divides by the source's.
    """
    if target not in cohort.nodes:
        return None
    row = cohort.nodes.index(target)
    updates = cohort.models.double() - cohort.origin.double()
    scale = torch.full((len(updates), 1), float(rate_ratio) if align else 1.0, dtype=torch.float64)
    if align and STEPS_METRIC in cohort.metrics:
        counts = cohort.metrics[STEPS_METRIC].clamp(min=1)
        scale *= (counts[row] / counts).nan_to_num(nan=1.0)[:, None]
    others = [i for i in range(len(updates)) if i != row]
    batches = cohort.steps.get(target)
    return RoundUpdates(updates[row], (updates * scale)[others], None if batches is None else batches.double())


class SourceWeights(NamedTuple):
    """The weight beta of each source, in [0, 1]; three variants, `[N]` each.

    `update` is the weight in FedDA, `projection` the weight in FedGP, and `tolerant_projection` the weight in FedGP
    with `allow_opposed_batches`, which allows for target batches that point away from the source.
    """

    update: Tensor
    projection: Tensor
    tolerant_projection: Tensor


def automatic_weights(updates: RoundUpdates, default: float = 0.5) -> SourceWeights:
    """Return the weights of least estimated error (Eq. 3), from the variance over the target's single batches.

    With fewer than two batches the variance is unknown, and all weights are `default`.
    """
    batches = updates.batches
    if batches is None or len(batches) < 2:
        constant = torch.full((len(updates.sources),), default, dtype=torch.float64)
        return SourceWeights(constant, constant, constant)
    count = len(batches)
    sources = updates.sources / count  # on the scale of one batch
    mean = batches.mean(dim=0)
    batch_variance = (batches - mean).square().sum() / (count - 1)
    variance = batch_variance / count
    directions = _unit_vectors(sources)
    components = batches @ directions.T  # of each batch along each source, [S, N]
    residuals = mean - components.mean(dim=0)[:, None] * directions  # of the mean, orthogonal to each source, [N, P]
    distance = (sources - mean).square().sum(dim=1) - variance
    orthogonal = residuals.square().sum(dim=1) - (batch_variance - components.var(dim=0)) / count
    agreement = 1 - (1 - (components > 0).double().mean(dim=0)) / count
    squared_norm = mean.square().sum()
    tolerant = agreement * orthogonal.clamp(min=0) + (1 - agreement) * squared_norm
    return SourceWeights(
        *(_weight(variance, error.clamp(min=0), squared_norm) for error in (distance, orthogonal, tolerant))
    )


def _weight(variance: Tensor, error: Tensor, squared_norm: Tensor) -> Tensor:
    """Return `variance / (error + variance)`, or 1 where both are negligible compared with `squared_norm`."""
    total = error + variance
    return torch.where(total > 1e-14 * squared_norm, variance / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)


def _unit_vectors(vectors: Tensor) -> Tensor:
    """Return the rows of `vectors` scaled to length 1; zero rows stay zero."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)


def projections(target: Tensor, sources: Tensor) -> Tensor:
    """Return the projection of `target [P]` on each of `sources [N, P]`; zero if their inner product is negative."""
    directions = _unit_vectors(sources)
    return (directions @ target).clamp(min=0)[:, None] * directions


def cosine_projections(target: Tensor, sources: Tensor) -> Tensor:
    """Return the term of the official code: each source times its cosine with the target, or zero if negative."""
    (direction,) = _unit_vectors(target[None])
    cosines: Tensor = _unit_vectors(sources) @ direction
    return cosines.clamp(min=0)[:, None] * sources


@dataclass(frozen=True)
class TargetRule(SightedRule[int]):
    """Trains a model for one client, `target`, with the help of all other clients, the sources.

    `beta` is the weight of the sources. `auto` estimates one weight per source from the updates of the target's
    single batches, which the target sends if `train.batch_updates` is set. `align` brings a source's update to the
    scale of the target's, by their numbers of batches and by `rate_ratio`, the target's learning rate over the
    sources'. The first `warmup_rounds` rounds average the sources only. A round without the target leaves the model
    unchanged, and its note "target" is 0. The memory is the number of rounds that changed the model. The rule does
    not withstand hostile sources.
    """

    preserves_consensus = False  # the sources' updates are rescaled

    target: str
    beta: float = 0.5
    auto: bool = False
    rate_ratio: float = 1.0
    align: bool = True
    warmup_rounds: int = 0

    def __post_init__(self) -> None:
        share(beta=self.beta)
        positive(rate_ratio=self.rate_ratio)
        at_least(0, warmup_rounds=self.warmup_rounds)

    def initial(self) -> int:
        """Return 0: no round has changed the model yet."""
        return 0

    def wants_batch_updates(self, node: str) -> bool:
        """Return whether `node` is the target."""
        return node == self.target

    @abstractmethod
    def step(self, updates: RoundUpdates, weights: SourceWeights, cohort: Cohort) -> tuple[Tensor, Tensor]:
        """Return the step from the origin, `[P]`, and the weights used, `[N]`. There is at least one source."""

    @final
    def mix(self, cohort: Cohort, memory: int) -> Mix[int]:
        """Move the origin by `step`, or by the target's update if no source replied."""
        is_source = torch.tensor([node != self.target for node in cohort.nodes])
        if memory < self.warmup_rounds and is_source.any():
            shares = cohort.shares * is_source / (cohort.shares * is_source).sum()
            return Mix(cohort.mixed(shares), memory + 1, shares)
        updates = round_updates(cohort, self.target, self.rate_ratio, self.align)
        notes = {"target": float(updates is not None)}
        if updates is None:
            return Mix(cohort.origin, memory, notes=notes)
        if not len(updates.sources):
            return Mix(cohort.origin + updates.target, memory + 1, notes=notes)
        beta = updates.target.new_full((len(updates.sources),), self.beta)
        step, betas = self.step(
            updates, automatic_weights(updates) if self.auto else SourceWeights(beta, beta, beta), cohort
        )
        return Mix(cohort.origin + step, memory + 1, notes=notes | {"beta": float(betas.mean())})
