"""SCAFFOLD: control variates correct the drift of local steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corymb.client.algorithms.algorithm import ClientAlgorithm, Memory
from corymb.protocol.train_settings import TrainSettings
from corymb.strategies.drift.scaffold import RATE_SUM


@dataclass(frozen=True)
class Scaffold(ClientAlgorithm):
    """Karimireddy et al. 2020, SCAFFOLD (Algorithm 1, option II), for the rule `scaffold`.

    Each step adds `c - c_i` to the gradient. The client keeps its control variate `c_i`; the rule sends its own, `c`.
    The rule computes the change of `c_i` from the client's model, so nothing more is sent back.
    """

    trains_in_blocks = True
    remembers = True
    keeps_gradients = True
    needs_rule = "scaffold"

    def correction(self, memory: Memory, received: Tensor | None) -> tuple[Tensor | None, float]:
        """See `ClientAlgorithm.correction`."""
        own = memory.get("control")
        if received is None:
            raise ValueError("The algorithm 'scaffold' needs what the rule 'scaffold' sends; use that rule.")
        return (received if own is None else received - own), 0.0

    def reports(self, settings: TrainSettings, server_round: int, steps: int) -> dict[str, float]:
        """See `ClientAlgorithm.reports`: the sum of the learning rates."""
        return {RATE_SUM: settings.rate(server_round) * steps}

    def remember(
        self, memory: Memory, received: Tensor | None, start: Tensor, end: Tensor, path: Tensor | float
    ) -> Memory:
        """See `ClientAlgorithm.remember`: `c_i - c + (start - end) / path`."""
        assert received is not None
        control = (start - end).div_(path).sub_(received)
        return {"control": control.add_(memory["control"]) if "control" in memory else control}
