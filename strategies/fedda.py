"""Sources and target averaged for the target's sake."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.strategies.checks import positive, share
from corymb.strategies.cohort import Cohort
from corymb.strategies.sighted import SightedRule
from corymb.strategies.target import Adaptation, adapted, trust


@dataclass(frozen=True)
class FedDA(SightedRule[None]):
    """Jiang, Zhang & Koyejo 2024, FedDA: for each source, a mixture of its update and the target site's.

    Only the test accuracy at `target` matters, a site with few examples. `beta` is the sources' part; `auto` finds
    one for each source, from the updates of the target's single batches (its setting `train.batch_updates`).
    A source's update is brought to the scale of the target's, by the numbers of their batches and by `rate_ratio`,
    the target's learning rate over the sources', unless `align` is false. A round without the target changes nothing.
    """

    target: str
    beta: float = 0.5
    auto: bool = False
    rate_ratio: float = 1.0
    align: bool = True

    def __post_init__(self) -> None:
        share(beta=self.beta)
        positive(rate_ratio=self.rate_ratio)

    def mix(self, cohort: Cohort, memory: None) -> tuple[Tensor, None]:
        """The mean over sources of `(1 - beta) * target + beta * source`."""
        return adapted(cohort, self.target, self.rate_ratio, self.align, self._step), None

    def _step(self, found: Adaptation, notes: dict[str, float]) -> Tensor:
        betas = trust(found).added if self.auto else found.target.new_full((len(found.sources),), self.beta)
        notes["beta"] = float(betas.mean())
        return ((1 - betas)[:, None] * found.target + betas[:, None] * found.sources).mean(dim=0)
