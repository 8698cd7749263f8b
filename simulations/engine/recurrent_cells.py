"""The cells of recurrent layers: one step of time, and its gradients.

For small cells autograd takes longer to record the operations of a step than the operations themselves take.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # the hidden state `[K, B, H]`, and for an LSTM the cell state


class Cell(Protocol):
    """A cell with `gates` blocks of H numbers; its `inputs` and `recurrent` products are `[K, B, gates * H]`.

    If the two products are just added, `adds` is True, and their gradients are the same.
    """

    adds: bool
    gates: int
    states: int

    def step(self, inputs: Tensor, recurrent: Tensor, state: State) -> tuple[State, Any]:
        """Return the next state, and what `back` needs. `recurrent` may be changed."""

    def back(self, gradients: State, saved: Any, into: Tensor, into_recurrent: Tensor) -> tuple[Tensor | None, State]:
        """Write the gradients of the two products, and return those of the hidden state, beside
        the recurrent product, and of the other states.

        `gradients` are those of the next state. If `adds`, only `into_recurrent` is written.
        """


class Tanh:
    """The cell of `nn.RNN`."""

    adds, gates, states = True, 1, 1

    def step(self, inputs: Tensor, recurrent: Tensor, state: State) -> tuple[State, Any]:
        """See `Cell.step`."""
        hidden = recurrent.add_(inputs).tanh_()
        return (hidden,), hidden

    def back(self, gradients: State, saved: Any, into: Tensor, into_recurrent: Tensor) -> tuple[Tensor | None, State]:
        """See `Cell.back`."""
        torch.ops.aten.tanh_backward.grad_input(gradients[0], saved, grad_input=into_recurrent)
        return None, ()


class Relu(Tanh):
    """The cell of `nn.RNN` with `nonlinearity="relu"`."""

    def step(self, inputs: Tensor, recurrent: Tensor, state: State) -> tuple[State, Any]:
        """See `Cell.step`."""
        hidden = recurrent.add_(inputs).relu_()
        return (hidden,), hidden

    def back(self, gradients: State, saved: Any, into: Tensor, into_recurrent: Tensor) -> tuple[Tensor | None, State]:
        """See `Cell.back`."""
        torch.ops.aten.threshold_backward.grad_input(gradients[0], saved, 0, grad_input=into_recurrent)
        return None, ()


class Gru:
    """The cell of `nn.GRU`: reset and update gate, and the new state."""

    adds, gates, states = False, 3, 1

    def step(self, inputs: Tensor, recurrent: Tensor, state: State) -> tuple[State, Any]:
        """See `Cell.step`."""
        (hidden,) = state
        both = 2 * hidden.shape[2]
        gates = torch.add(inputs[..., :both], recurrent[..., :both]).sigmoid_()
        reset, update = gates.chunk(2, dim=2)
        recurrent = recurrent[..., both:]
        new = torch.addcmul(inputs[..., both:], reset, recurrent).tanh_()
        return (torch.lerp(new, hidden, update),), (gates, new, hidden, recurrent)

    def back(self, gradients: State, saved: Any, into: Tensor, into_recurrent: Tensor) -> tuple[Tensor | None, State]:
        """See `Cell.back`."""
        (gradient,), (gates, new, hidden, recurrent) = gradients, saved
        size = hidden.shape[2]
        reset, update = gates.chunk(2, dim=2)
        direct = gradient * update
        of_new = into[..., 2 * size :]
        torch.ops.aten.tanh_backward.grad_input(gradient - direct, new, grad_input=of_new)
        torch.mul(of_new, reset, out=into_recurrent[..., 2 * size :])
        of_gates = torch.cat((of_new * recurrent, (hidden - new).mul_(gradient)), dim=2)
        both = into_recurrent[..., : 2 * size]
        torch.ops.aten.sigmoid_backward.grad_input(of_gates, gates, grad_input=both)
        into[..., : 2 * size] = both
        return direct, ()


class Lstm:
    """The cell of `nn.LSTM`: input and forget gate, the new cell state, and the output gate."""

    adds, gates, states = True, 4, 2

    def step(self, inputs: Tensor, recurrent: Tensor, state: State) -> tuple[State, Any]:
        """See `Cell.step`."""
        size = state[1].shape[2]
        products = recurrent.add_(inputs)
        new = products[..., 2 * size : 3 * size].tanh()
        gates = products.sigmoid_()
        enter, forget, _, leave = gates.chunk(4, dim=2)
        cell = torch.addcmul(forget * state[1], enter, new)
        squashed = cell.tanh()
        return (leave * squashed, cell), (gates, new, state[1], squashed)

    def back(self, gradients: State, saved: Any, into: Tensor, into_recurrent: Tensor) -> tuple[Tensor | None, State]:
        """See `Cell.back`."""
        (of_hidden, of_cell), (gates, new, before, squashed) = gradients, saved
        size = before.shape[2]
        enter, forget, _, leave = gates.chunk(4, dim=2)
        of_cell = of_cell + torch.ops.aten.tanh_backward(of_hidden * leave, squashed)
        of_gates = torch.cat((of_cell * new, of_cell * before, of_cell, of_hidden * squashed), dim=2)
        torch.ops.aten.sigmoid_backward.grad_input(of_gates, gates, grad_input=into_recurrent)
        of_new = into_recurrent[..., 2 * size : 3 * size]
        torch.ops.aten.tanh_backward.grad_input(of_cell * enter, new, grad_input=of_new)
        return None, (of_cell * forget,)


CELLS: dict[str, Cell] = {"RNN_TANH": Tanh(), "RNN_RELU": Relu(), "GRU": Gru(), "LSTM": Lstm()}
