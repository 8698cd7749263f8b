"""`nn.Embedding` with one table per client."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corymb.simulations.engine.layers import ClientLayer, StepContext


class ClientEmbedding(ClientLayer):
    """`nn.Embedding` for K clients: their tables become one, and each client's tokens are shifted to its own part."""

    def __init__(self, original: nn.Embedding, context: StepContext) -> None:
        super().__init__(original, context)
        if original.max_norm is not None or original.scale_grad_by_freq or original.sparse:
            raise ValueError("is an Embedding with max_norm, scale_grad_by_freq or sparse")
        self._padding = original.padding_idx

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        """See `ClientLayer.run`."""
        tables = parameters["weight"]
        clients, tokens, _ = tables.shape
        by_client = inputs.unflatten(0, (clients, -1))
        first = (torch.arange(clients, device=inputs.device) * tokens).view(-1, *[1] * (by_client.dim() - 1))
        outputs = F.embedding(by_client + first, tables.flatten(0, 1)).flatten(0, 1)
        if self._padding is None:
            return outputs
        is_padding = (inputs == self._padding)[..., None]
        return torch.where(is_padding, outputs.detach(), outputs)  # the padding's own row never trains
