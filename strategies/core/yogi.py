"""The optimiser Yogi (Zaheer et al. 2018), which torch lacks: Adam with additive updates of the second moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Yogi(torch.optim.Optimizer):
    """Yogi without bias correction, as in Reddi et al. 2021 (FedYogi): `v <- v - (1 - b2) * g^2 * sign(v - g^2)`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one step with the current gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update_parameter(parameter, group, self.state[parameter])

    def _update_parameter(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        beta1, beta2 = group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        square = gradient.square()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].sub_((1 - beta2) * square * (state["exp_avg_sq"] - square).sign())
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])
