"""Adam with additive changes of the second moment (Zaheer et al. 2018), as torch has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Yogi(torch.optim.Optimizer):
    """Without bias correction, as in Reddi et al. 2021 (FedYogi): `v - (1 - b2) * g^2 * sign(v - g^2)`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, group, self.state[parameter])

    def _move(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        first, second = group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        square = gradient.square()
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].sub_((1 - second) * square * (state["exp_avg_sq"] - square).sign())
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])
