"""Updates trusted as far as they agree with the server's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import norms, products
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class FLTrust(SightedRule[None]):
    """Cao et al. 2021, FLTrust: the server trains on clean data of its own, and trusts what points the same way.

    An update counts by its cosine with the server's update, if positive, and is brought to that length. The server
    trains for `epochs` of SGD on the proxy data. Where nobody is trusted, the model stays.
    """

    needs_proxy = True
    unanimous = False
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        at_least(0, momentum=self.momentum)
        positive(learning_rate=self.learning_rate)

    def tolerates(self, clients: int) -> int:
        """Any number: no step is longer than the server's own."""
        return clients

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Train, compare, and mix."""
        proxy = cohort.proxy
        own = proxy.session(cohort.buffers).fit(
            cohort.origin,
            torch.arange(len(proxy.inputs)),
            proxy.labels,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            seed=self.seed,
        )
        weights = trusted(cohort.models, cohort.origin, own)
        return Mix(cohort.mixed(weights), weights=weights)


def trusted(models: Tensor, origin: Tensor, own: Tensor) -> Tensor:
    """The weight of each update of `models [K, P]`, given the server's `own [P]`; all zero where none is trusted."""
    lengths = norms(torch.cat([own[None], models]), origin)
    inner = torch.stack([products(torch.stack([own, model]), origin)[0, 1] for model in models])
    tiny = torch.finfo(torch.float64).tiny
    scores = (inner / (lengths[0] * lengths[1:]).clamp(min=tiny)).clamp(min=0)
    return scores / scores.sum().clamp(min=tiny) * lengths[0] / lengths[1:].clamp(min=tiny)
