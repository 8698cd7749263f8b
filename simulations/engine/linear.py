"""`nn.Linear` with one set of weights per client, in the cheapest weight form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.simulations.engine.gram_products import GramMatrices
from corymb.simulations.engine.layers import Block, ClientLayer, StepContext
from corymb.simulations.engine.low_rank import InputHistoryWeights, LowRankBias, LowRankWeights
from corymb.simulations.engine.optimizer import is_plain
from corymb.simulations.engine.weight_forms import DenseWeights, WeightForm, as_dtype, first_rows


class ClientLinear(ClientLayer):
    """`nn.Linear` for K clients.

    `gram`, if set, may give the weights a form over the examples of each client. `rows` is the number of rows that the
    layer gets per example: 1, or the length of a sequence.
    """

    by_hand = True
    gram: GramMatrices | None = None
    rows = 1

    def __init__(self, original: nn.Linear, context: StepContext) -> None:
        super().__init__(original, context)
        self._shape = original.weight.shape

    def keeps_factors(self, settings: TrainSettings) -> bool:
        """Return whether what clients keep of this layer is best kept as factors over their examples, in all rounds."""
        if self.gram is None or self.rows != 1 or settings.precision != "float32":
            return False
        return is_plain(settings) and not settings.proximal and self.gram.are_cheaper_for_all(settings, self._shape)

    def start_block(self, start: Mapping[str, Tensor], block: Block) -> None:
        """See `ClientLayer.start_block`."""
        weight, bias = start["weight"], start.get("bias")
        form: LowRankWeights | None = None
        if block.offset is not None and self.gram is not None:
            form = self.gram.form_with(block.offset, weight, bias, block.clients, block.batches, block.is_plain)
        elif block.may_be_low_rank:
            rows = block.batches.rows[0].numel() * self.rows
            if self.gram is not None and self.rows == 1:
                form = self.gram.form(weight, bias, block.clients, block.batches, block.is_plain)
            if form is None and low_rank_is_cheaper(rows, *weight.shape):
                form = InputHistoryWeights(weight, bias, len(block.clients), rows, block.is_plain)
        if form is None:
            super().start_block(start, block)
            return
        self.forms = {"weight": form} | ({} if bias is None else {"bias": LowRankBias(form, bias)})

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Tensor, tuple[Tensor, torch.dtype]]:
        """See `ClientLayer.outputs`."""
        rows = self.cast(inputs.reshape(self.context.clients, -1, inputs.shape[-1]))
        outputs = self.forms["weight"].outputs(rows)
        if isinstance(bias := self.forms.get("bias"), DenseWeights):
            outputs = outputs.add_(first_rows(self.context.clients, bias.weight).unsqueeze(1))
        return outputs.reshape(*inputs.shape[:-1], -1), (rows, inputs.dtype)

    def backward(self, gradients: Tensor, saved: Any, needs_input_gradients: bool) -> Tensor | None:
        """See `ClientLayer.backward`."""
        rows, dtype = saved
        weight: WeightForm = self.forms["weight"]
        by_client = gradients.reshape(self.context.clients, -1, gradients.shape[-1])
        result = (
            as_dtype(weight.input_gradients(by_client).reshape(*gradients.shape[:-1], -1), dtype)
            if needs_input_gradients
            else None
        )
        weight.apply_gradients(by_client, rows, self.context.rate)
        self.apply_bias_gradients(by_client)
        return result


@torch.no_grad()
def rows_per_example(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Return how many rows each linear layer of `module` gets for `example [1, ...]`, by the layer's name."""
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[name] = inputs[0].shape[:-1].numel()

        return hook

    layers = [(name, layer) for name, layer in module.named_modules() if type(layer) is nn.Linear]
    handles = [layer.register_forward_pre_hook(count(name)) for name, layer in layers]
    training = module.training
    try:
        module.eval()(example)
    except Exception as error:  # the model's own code runs here
        raise ValueError(f"the model fails on one example ({type(error).__name__}: {error})") from error
    finally:
        module.train(training)
        for handle in handles:
            handle.remove()
    return rows


def low_rank_is_cheaper(rows: int, outputs: int, inputs: int) -> bool:
    """Return whether `rows` stored inputs cost less than a dense weight that is read and written at each step."""
    return rows < outputs * inputs / (outputs + inputs)
