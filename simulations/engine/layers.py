"""The base class of client layers: layers with one set of weights per client, for K clients that train together.

The batches of the clients are concatenated. Layers without parameters, such as ReLU or pooling, are not replaced,
because they process examples independently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from corymb.client import TrainSettings
from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.gram_weights import GramOffset
from corymb.simulations.engine.optimizer import is_linear
from corymb.simulations.engine.weight_forms import DenseWeights, as_dtype, first_rows


@dataclass
class StepContext:
    """The state of the current step, shared by all client layers of a module."""

    use_patches: bool = False  # for convolutions: on a GPU, where one kernel launch per client is too small
    precision: torch.dtype | None = None  # the dtype to convert the inputs of client layers to; None: leave them
    clients: int = 1  # number of clients that still train
    rate: float | None = None  # learning rate of plain SGD; None: leave gradients for an optimiser
    lengths: list[int] = field(default_factory=list)  # examples in each client's batch; the rest is padding
    generators: Sequence[torch.Generator] = ()  # each client's source of random numbers


@dataclass(frozen=True)
class Block:
    """What a layer needs to know about the block of K clients that it starts to train.

    With `own_starts`, every client has a start of its own, and tensors of the start have a first dimension K.
    `low_rank` says whether low-rank weight forms are allowed, and `is_plain` whether a step is plain SGD. With an
    `offset`, the first layer must have `GramWeights`.
    """

    clients: Sequence[int]
    batches: Batches
    settings: TrainSettings
    own_starts: bool
    low_rank: bool
    is_plain: bool
    offset: GramOffset | None = None

    @property
    def may_be_low_rank(self) -> bool:
        """Whether the steps allow low-rank forms; in a lower precision their products would be rounded twice."""
        is_float32 = self.settings.precision == "float32"
        return self.low_rank and not self.own_starts and is_float32 and is_linear(self.settings)


class ClientLayer(nn.Module):
    """A layer of K clients. A subclass replaces one kind of torch layer; `CLIENT_LAYERS` names the pairs.

    A subclass implements `run`, with torch operations that autograd knows, or, to be faster, `outputs` and `backward`
    by hand, and sets `by_hand`. It raises `ValueError` in `__init__` for an original that it cannot replace; the
    message says what about it, as in "is a Conv2d with padding_mode = 'circular'".

    `names` are the original's parameters. `forms` holds the parameters of the present block by name, each in a weight
    form; `start_block` chooses the forms, which are dense unless a subclass knows better.
    """

    by_hand: ClassVar[bool] = False
    needs_lengths: ClassVar[bool] = False  # whether `context.lengths` is read

    def __init__(self, original: nn.Module, context: StepContext) -> None:
        super().__init__()
        self.context = context
        self.names = [name for name, _ in original.named_parameters()]
        self.forms: dict[str, Any] = {}  # of `BlockParameter`
        self._anchor = torch.zeros(1, requires_grad=True)  # makes autograd run backward through the first layer too

    def start_block(self, start: Mapping[str, Tensor], block: Block) -> None:
        """Set the parameters, and the buffers if there are any, of a new block to their values in `start`."""
        self.forms = {name: DenseWeights(start[name], len(block.clients), block.own_starts) for name in self.names}

    def buffers_after(self) -> dict[str, Tensor]:
        """Return the buffers at the K clients after the training of a block, `{name: [K, ...]}`."""
        return {}

    def run(self, inputs: Tensor, **parameters: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for `inputs [K * B, ...]`; each of `parameters` is `[K, ...]`."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Any:
        """Return the outputs of all clients, `[K * B, ...]`."""
        return _ApplyLayer.apply(inputs, self._anchor, self)  # type: ignore[no-untyped-call]

    def outputs(self, inputs: Tensor, needs_input_gradients: bool) -> tuple[Any, Any]:
        """Return the outputs and what `backward` needs; the caller passes the same flag to `backward`."""
        inputs = inputs.detach().requires_grad_(needs_input_gradients)
        with torch.enable_grad():
            cast = self.cast(inputs)
            parameters = {name: self.parameter(name, cast).detach().requires_grad_() for name in self.names}
            outputs = self.run(cast, **parameters)
        if isinstance(outputs, tuple):
            return tuple(each.detach() for each in outputs), (inputs, parameters, outputs)
        return outputs.detach(), (inputs, parameters, (outputs,))

    def backward(self, gradients: Any, saved: Any, needs_input_gradients: bool) -> Any:
        """Update the weights from the gradients of the outputs; return those of the inputs, or None if not needed."""
        inputs, parameters, outputs = saved
        wanted = [*parameters.values(), *([inputs] if needs_input_gradients else [])]
        found = torch.autograd.grad(outputs, wanted, gradients if isinstance(gradients, tuple) else (gradients,))
        for name, gradient in zip(parameters, found, strict=False):
            self.dense(name).apply_weight_gradient(gradient, self.context.rate)
        return found[-1] if needs_input_gradients else None

    def dense(self, name: str) -> DenseWeights:
        """Return the parameter `name`, which must be in the dense form."""
        form = self.forms[name]
        assert isinstance(form, DenseWeights)
        return form

    def parameter(self, name: str, like: Tensor) -> Tensor:
        """Return the parameter `name` of the clients that still train, in the dtype of `like` if that is a float."""
        weight = first_rows(self.context.clients, self.dense(name).weight)
        return as_dtype(weight, like.dtype) if like.is_floating_point() else weight

    def cast(self, inputs: Tensor) -> Tensor:
        """Return `inputs` in the precision of the step."""
        is_cast = self.context.precision is not None and inputs.is_floating_point()
        return inputs.to(self.context.precision) if is_cast else inputs

    def apply_bias_gradients(self, gradients: Tensor) -> None:
        """Update the dense bias, if there is one, from the gradients `[K, B, out]` of the outputs."""
        if isinstance(bias := self.forms.get("bias"), DenseWeights):
            bias.apply_weight_gradient(gradients.sum(dim=1), self.context.rate)


class _ApplyLayer(torch.autograd.Function):
    """Makes a client layer part of an autograd graph; in the backward pass the layer updates its own weights."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, layer: Any) -> Any:
        ctx.layer = layer
        outputs, ctx.saved = layer.outputs(inputs, inputs.requires_grad)
        return tuple(map(_no_view, outputs)) if isinstance(outputs, tuple) else _no_view(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        several = gradients if len(gradients) > 1 else gradients[0]
        return ctx.layer.backward(several, ctx.saved, ctx.needs_input_grad[0]), None, None


def _no_view(tensor: Tensor) -> Tensor:
    """Return a tensor with the same memory that is no view, so that later layers may change it in place."""
    storage, shape = tensor.untyped_storage(), (tensor.storage_offset(), tensor.size(), tensor.stride())
    return tensor.new_empty(0).set_(storage, *shape)
