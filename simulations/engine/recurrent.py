"""Recurrent layers with one set of weights per client: one matrix product for all clients at each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corymb.simulations.engine.layers import ClientLayer, StepContext


class ClientRecurrent(ClientLayer):
    """`nn.RNN`, `nn.GRU` and `nn.LSTM` for K clients, with batches first and a state that starts at zero."""

    def __init__(self, original: nn.RNNBase, context: StepContext) -> None:
        super().__init__(original, context)
        if not original.batch_first or original.dropout or getattr(original, "proj_size", 0):
            raise ValueError(f"is a {type(original).__name__} without batch_first, or with dropout or proj_size")
        self._mode, self._size, self._layers = original.mode, original.hidden_size, original.num_layers
        self._directions = ("", "_reverse") if original.bidirectional else ("",)

    def forward(self, inputs: Tensor) -> Any:
        """Return the outputs and the last state, as the original does."""
        outputs, *states = super().forward(inputs)
        return outputs, tuple(states) if self._mode == "LSTM" else states[0]

    def run(self, inputs: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
        """See `ClientLayer.run`. Returns `[K * B, T, out]`, then the last hidden and, for an LSTM, cell states."""
        sequence = inputs.unflatten(0, (self.context.clients, -1))  # [K, B, T, in]
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self._layers):
            parts = []
            for direction in self._directions:
                names = [f"{kind}_{side}_l{layer}{direction}" for kind in ("weight", "bias") for side in ("ih", "hh")]
                outputs, state = self._pass(sequence, bool(direction), *map(parameters.get, names))
                parts.append(outputs)
                last.append(state)
            sequence = torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]
        return sequence.flatten(0, 1), *(torch.stack(states).flatten(1, 2) for states in zip(*last, strict=True))

    def _pass(
        self, sequence: Tensor, backwards: bool, weight_in: Any, weight: Any, bias_in: Any, bias: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run one layer over `sequence [K, B, T, in]`; return its outputs `[K, B, T, size]` and its last state."""
        clients, batch, times, _ = sequence.shape
        products = torch.bmm(sequence.flatten(1, 2), weight_in.mT)
        if bias_in is not None:
            products = products + bias_in[:, None]
        steps = products.unflatten(1, (batch, times)).unbind(2)
        zero = sequence.new_zeros(clients, batch, self._size)
        state: tuple[Tensor, ...] = (zero, zero) if self._mode == "LSTM" else (zero,)
        hidden, step = weight.mT, _STEPS[self._mode]
        added = None if bias is None else bias[:, None]
        outputs = []
        for inputs in reversed(steps) if backwards else steps:
            recurrent = torch.bmm(state[0], hidden) if added is None else torch.baddbmm(added, state[0], hidden)
            state = step(inputs, recurrent, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs, dim=2), state


def _tanh(inputs: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((inputs + recurrent).tanh(),)


def _relu(inputs: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((inputs + recurrent).relu(),)


def _gru(inputs: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    size = state[0].shape[2]
    gates = (inputs[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid()
    reset, update = gates.chunk(2, dim=2)
    new = torch.addcmul(inputs[..., 2 * size :], reset, recurrent[..., 2 * size :]).tanh()
    return (torch.lerp(new, state[0], update),)


def _lstm(inputs: Tensor, recurrent: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    enter, forget, new, leave = (inputs + recurrent).chunk(4, dim=2)
    cell = torch.addcmul(forget.sigmoid() * state[1], enter.sigmoid(), new.tanh())
    return leave.sigmoid() * cell.tanh(), cell


_STEPS = {"RNN_TANH": _tanh, "RNN_RELU": _relu, "GRU": _gru, "LSTM": _lstm}
