"""FedDyn: a dynamic regulariser aligns the optima of the clients with that of the federation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.client.algorithms.algorithm import ClientAlgorithm, Memory


@dataclass(frozen=True)
class FedDyn(ClientAlgorithm):
    """Acar et al. 2021, FedDyn (Algorithm 1), for the rule `feddyn`, which sets `alpha` for both.

    The client's loss is `L_k(w) - <h_k, w> + alpha / 2 |w - w_t|^2`. It keeps `h_k`.
    """

    trains_in_blocks = True
    pulls = True
    remembers = True
    keeps_gradients = True

    alpha: float = 0.1

    def correction(self, memory: Memory, received: Tensor | None) -> tuple[Tensor | None, float]:
        """See `ClientAlgorithm.correction`."""
        own = memory.get("gradient")
        return (None if own is None else -own), self.alpha

    def remember(
        self, memory: Memory, received: Tensor | None, start: Tensor, end: Tensor, path: Tensor | float
    ) -> Memory:
        """See `ClientAlgorithm.remember`: `h_k - alpha (end - start)`."""
        gradient = (start - end).mul_(self.alpha)
        return {"gradient": gradient.add_(memory["gradient"]) if "gradient" in memory else gradient}
