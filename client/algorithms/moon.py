"""MOON: a contrastive term keeps a client's features near those of the shared model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corymb.client.algorithms.algorithm import ClientAlgorithm, Local
from corymb.client.batches import Batch, outputs_and_targets


@dataclass(frozen=True)
class Moon(ClientAlgorithm):
    """Li, He & Song 2021, MOON (eq. 3): the loss gets `weight` (mu) times a contrastive term.

    The term draws the features of an example towards those of the received model and away from those of the client's
    last model, with cosine similarities divided by `temperature`. The features are what goes into the last layer with
    parameters, or comes out of the layer called `features`.
    """

    weight: float = 1.0
    temperature: float = 0.5
    features: str = ""

    def train(self, local: Local) -> dict[str, float]:
        """See `ClientAlgorithm.train`."""
        device = next(local.module.parameters()).device
        received, last = local.new_module().to(device), local.copy_with("last")
        received.load_state_dict(local.module.state_dict())
        references = [module.eval().requires_grad_(False) for module in (received, last)]
        with _watched(local.module, self.features) as own:

            def term(module: nn.Module, batch: Batch, outputs: Any) -> Tensor:
                others = []
                for reference in references:
                    with _watched(reference, self.features) as seen, torch.no_grad():
                        outputs_and_targets(reference, batch)
                    others.append(seen[-1].flatten(1))
                features = own[-1].flatten(1)
                own.clear()
                similar = torch.stack([nn.functional.cosine_similarity(features, each) for each in others], dim=1)
                closest = torch.zeros(len(features), dtype=torch.long, device=features.device)
                return self.weight * nn.functional.cross_entropy(similar / self.temperature, closest)

            metrics = local.fit(local.module, term=term)
        local.keep_model("last", local.module)
        return metrics


@contextmanager
def _watched(module: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Yield a list that gets the features of each forward pass of `module`."""
    seen: list[Tensor] = []
    if layer:
        handle = module.get_submodule(layer).register_forward_hook(lambda _, inputs, output: seen.append(output))
    else:
        *_, last = (each for each in module.modules() if list(each.parameters(recurse=False)))
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
