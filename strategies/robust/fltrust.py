"""FLTrust: updates weighted by their agreement with an update that the server trains itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.geometry import inner_products, norms
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, positive


@dataclass(frozen=True)
class FLTrust(SightedRule[None]):
    """Cao et al. 2021, FLTrust: weighs updates by their agreement with an update trained on the server's clean data.

    The weight of an update is its cosine with the server's update, or zero if that is negative. Each update is scaled
    to the length of the server's. The server trains on the proxy data, for `epochs` epochs of SGD. If all weights are
    zero, the model stays unchanged.
    """

    needs_proxy = True
    preserves_consensus = False
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
        """Return `clients`: the step is never longer than the server's own update."""
        return clients

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Train on the proxy data, compare the clients' updates with the result, and mix them."""
        proxy = cohort.proxy
        server_model = proxy.session(cohort.buffers).fit(
            cohort.origin,
            torch.arange(len(proxy.inputs)),
            proxy.labels,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            seed=self.seed,
        )
        weights = trust_weights(cohort.models, cohort.origin, server_model)
        return Mix(cohort.mixed(weights), weights=weights)


def trust_weights(models: Tensor, origin: Tensor, server_model: Tensor) -> Tensor:
    """Return the weight of each of `models [K, P]`, given `server_model [P]`; all zero if no cosine is positive."""
    lengths = norms(torch.cat([server_model[None], models]), origin)
    products = torch.stack([inner_products(torch.stack([server_model, model]), origin)[0, 1] for model in models])
    tiny = torch.finfo(torch.float64).tiny
    scores = (products / (lengths[0] * lengths[1:]).clamp(min=tiny)).clamp(min=0)
    return scores / scores.sum().clamp(min=tiny) * lengths[0] / lengths[1:].clamp(min=tiny)
