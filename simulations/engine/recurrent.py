"""Recurrent layers with one set of weights per client: one matrix product for all clients at each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corymb.simulations.engine.layers import ClientLayer, StepContext
from corymb.simulations.engine.recurrent_cells import CELLS, Cell


class ClientRecurrent(ClientLayer):
    """`nn.RNN`, `nn.GRU` and `nn.LSTM` for K clients, with batches first and a state that starts at zero."""

    by_hand = True

    def __init__(self, original: nn.RNNBase, context: StepContext) -> None:
        super().__init__(original, context)
        if not original.batch_first or original.dropout or getattr(original, "proj_size", 0):
            raise ValueError(f"is a {type(original).__name__} without batch_first, or with dropout or proj_size")
        self._cell, self._size, self._layers = CELLS[original.mode], original.hidden_size, original.num_layers
        self._directions = ("", "_reverse") if original.bidirectional else ("",)

    def forward(self, inputs: Tensor) -> Any:
        """Return the outputs and the last state, as the original does."""
        outputs, *states = super().forward(inputs)
        return outputs, tuple(states) if len(states) > 1 else states[0]

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Any, Any]:
        """See `ClientLayer.outputs`. The outputs are `[K * B, T, out]`, and the last hidden and cell states."""
        sequence = self.cast(inputs).unflatten(0, (self.context.clients, -1)).transpose(1, 2)  # [K, T, B, in]
        passes: list[list[_Pass]] = []
        for layer in range(self._layers):
            sequence = sequence.contiguous()
            passes.append([self._pass(sequence, layer, direction) for direction in self._directions])
            sequence = (
                torch.cat([each.outputs for each in passes[-1]], dim=3)
                if len(passes[-1]) > 1
                else passes[-1][0].outputs
            )
        last = [each.last for layer_passes in passes for each in layer_passes]
        states = [torch.stack(each).flatten(1, 2) for each in zip(*last, strict=True)]
        flat = sequence.transpose(1, 2).flatten(0, 1)
        if flat.untyped_storage().data_ptr() == sequence.untyped_storage().data_ptr():
            flat = flat.clone()  # a later layer may change the outputs in place, and `back` needs them
        return (flat, *states), (passes, inputs.dtype)

    def backward(self, gradients: Any, saved: Any, needs_input_gradients: bool) -> Any:
        """See `ClientLayer.backward`."""
        passes, dtype = saved
        of_outputs, *of_states = gradients
        clients = self.context.clients
        of_sequence = of_outputs.unflatten(0, (clients, -1)).transpose(1, 2)
        of_last = [each.unflatten(1, (clients, -1)) for each in of_states]  # [layers * directions, K, B, H]
        for layer in reversed(range(self._layers)):
            parts = of_sequence.split(self._size, dim=3)
            needs_inputs, found = needs_input_gradients or layer > 0, []
            for number, (each, direction) in enumerate(zip(passes[layer], self._directions, strict=True)):
                index = layer * len(self._directions) + number
                found.append(each.back(parts[number], tuple(state[index] for state in of_last), needs_inputs))
                for name, gradient in each.gradients.items():
                    self.dense(_named(name, layer, direction)).apply_weight_gradient(gradient, self.context.rate)
            of_sequence = torch.stack(found).sum(dim=0) if len(found) > 1 else found[0]
        return of_sequence.transpose(1, 2).flatten(0, 1).to(dtype) if needs_input_gradients else None

    def _pass(self, sequence: Tensor, layer: int, direction: str) -> _Pass:
        parameters = {
            name: self.parameter(_named(name, layer, direction), sequence)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            if _named(name, layer, direction) in self.forms
        }
        return _Pass(self._cell, sequence, parameters, self._size, bool(direction))


class _Pass:
    """One layer's way over `sequence [K, T, B, in]`, in one direction.

    `outputs` are `[K, T, B, H]`, `last` is the state at the end, and after `back`, `gradients` has those of the
    `parameters`.
    """

    def __init__(
        self, cell: Cell, sequence: Tensor, parameters: Mapping[str, Tensor], size: int, backwards: bool
    ) -> None:
        clients, times, batch, _ = sequence.shape
        self._cell, self._sequence, self._parameters = cell, sequence, parameters
        self._order = range(times)[::-1] if backwards else range(times)
        products = torch.bmm(sequence.flatten(1, 2), parameters["weight_ih"].mT)
        if "bias_ih" in parameters:
            products.add_(parameters["bias_ih"][:, None])
        products = products.unflatten(1, (times, batch))
        # The states before and after each time: a row more than there are times, and zeros at the beginning.
        states = sequence.new_zeros(clients, times + 1, batch, size)
        self.outputs, self._before = (states[:, :-1], states[:, 1:]) if backwards else (states[:, 1:], states[:, :-1])
        weight = parameters["weight_hh"].mT
        added = parameters["bias_hh"][:, None] if "bias_hh" in parameters else None
        state = tuple(sequence.new_zeros(clients, batch, size) for _ in range(cell.states))
        self._saved = []
        for time in self._order:
            recurrent = torch.bmm(state[0], weight) if added is None else torch.baddbmm(added, state[0], weight)
            state, saved = cell.step(products[:, time], recurrent, state)
            self.outputs[:, time] = state[0]
            self._saved.append(saved)
        self.last = state
        self.gradients: dict[str, Tensor] = {}

    def back(self, of_outputs: Tensor, of_last: tuple[Tensor, ...], needs_inputs: bool) -> Tensor:
        """Return the gradients of the sequence, or zeros without a shape if they are not needed."""
        cell, parameters, weight = self._cell, self._parameters, self._parameters["weight_hh"]
        clients, times, batch, _ = self._sequence.shape
        of_recurrent = self._sequence.new_empty(clients, times, batch, weight.shape[1])
        of_products = of_recurrent if cell.adds else torch.empty_like(of_recurrent)
        of_hidden, others = of_last[0], of_last[1:]
        for time in reversed(self._order):
            through = of_recurrent[:, time]
            gradients = (of_hidden + of_outputs[:, time], *others)
            direct, others = cell.back(gradients, self._saved.pop(), of_products[:, time], through)
            of_hidden = torch.bmm(through, weight) if direct is None else torch.baddbmm(direct, through, weight)
        sequence, before = self._sequence.flatten(1, 2), self._before.flatten(1, 2)
        rows, recurrent_rows = of_products.flatten(1, 2), of_recurrent.flatten(1, 2)
        self.gradients = {
            "weight_ih": torch.bmm(rows.mT, sequence), "weight_hh": torch.bmm(recurrent_rows.mT, before),
        }  # fmt: skip
        if "bias_ih" in parameters:
            self.gradients |= {"bias_ih": rows.sum(dim=1), "bias_hh": recurrent_rows.sum(dim=1)}
        if not needs_inputs:
            return sequence.new_zeros(())
        of_sequence: Tensor = torch.bmm(rows, parameters["weight_ih"]).unflatten(1, (times, batch))
        return of_sequence


def _named(name: str, layer: int, direction: str) -> str:
    return f"{name}_l{layer}{direction}"
