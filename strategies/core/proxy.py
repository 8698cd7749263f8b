"""The server's own examples, and the module that is learnt: what rules try models on before they are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from corymb.strategies.core.layout import Layout, Model

Loss = Callable[[Tensor, Tensor], Tensor]
ROWS = 1024  # examples that are scored at a time


@dataclass(frozen=True)
class Proxy:
    """Examples that the server holds itself: `inputs [N, ...]`, and `targets [N]` where they are labelled.

    `module` gives the architecture only; models come as vectors of its `layout` (see `Layout.of_module`).
    `loss(outputs, targets)` is a mean over examples.
    """

    module: nn.Module
    inputs: Tensor
    targets: Tensor | None = None
    loss: Loss = nn.functional.cross_entropy

    def __post_init__(self) -> None:
        if not len(self.inputs):
            raise ValueError("The proxy data hold 0 examples; give some, or choose a rule that needs none.")
        if self.targets is not None and len(self.targets) != len(self.inputs):
            raise ValueError(f"The proxy data have {len(self.inputs)} inputs for {len(self.targets)} targets.")
        names = dict(self.module.named_parameters(remove_duplicate=False))
        if shared := names.keys() - dict(self.module.named_parameters()).keys():
            raise ValueError(f"The proxy's module uses {min(shared)!r} under two names; proxy data need one for each.")

    @cached_property
    def layout(self) -> Layout:
        """How the module's state dict is laid out as vectors."""
        return Layout.of_module(self.module)

    @property
    def labels(self) -> Tensor:
        """The targets. Raises `ValueError` for data without."""
        if self.targets is None:
            raise ValueError("This rule needs labelled proxy data and they have no targets; give targets.")
        return self.targets

    def batches(self, size: int) -> Iterator[Tensor]:
        """The rows of all examples in batches of `size`, in order."""
        yield from batches_of(torch.arange(len(self.inputs)), size)

    def outputs(self, parameters: Tensor, buffers: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the model `parameters [P]`, `buffers [B]` says of the examples at `rows`, in evaluation mode.

        Differentiable in `parameters`.
        """
        with self._mode(statistics=False):
            inputs = self.inputs if rows is None else self.inputs[rows]
            return self._call(parameters, self._buffers(buffers), inputs)

    @torch.no_grad()
    def scores(self, parameters: Tensor, buffers: Tensor) -> Tensor:
        """`outputs` of all examples, a block of rows at a time; `[N, C]`."""
        return torch.cat([self.outputs(parameters, buffers, rows) for rows in self.batches(ROWS)])

    def ballots(self, models: Tensor, buffers: Tensor) -> Tensor:
        """The scores of each of `models [V, P]` with its `buffers [V, B]`, `[V, N, C]`."""
        return torch.stack([self.scores(*voter) for voter in zip(models, buffers, strict=True)])

    def accuracy(self, parameters: Tensor, buffers: Tensor) -> float:
        """The share of examples whose highest score is the target's."""
        return float((self.scores(parameters, buffers).argmax(dim=1) == self.labels).double().mean())

    @torch.no_grad()
    def loss_of(self, parameters: Tensor, buffers: Tensor) -> float:
        """The mean loss over all examples."""
        return float(self.loss(self.scores(parameters, buffers), self.labels))

    def session(self, buffers: Tensor) -> Session:
        """Train models on these examples; BatchNorm's statistics begin at `buffers` and move along."""
        return Session(self, self._buffers(buffers))

    def refreshed(self, parameters: Tensor, buffers: Tensor) -> Tensor:
        """`buffers [B]` with BatchNorm's statistics estimated anew, for `parameters`, on these examples."""
        norms = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return buffers
        state = self._buffers(buffers)
        momenta = [norm.momentum for norm in norms]
        for name in state:
            if name.endswith("num_batches_tracked"):
                state[name].zero_()
        try:
            for norm in norms:
                norm.momentum = None  # a plain mean over the batches
            with torch.no_grad(), self._mode(statistics=True):
                for rows in self.batches(ROWS):
                    self._call(parameters, state, self.inputs[rows])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        return self.layout.buffers_of(state)

    def _buffers(self, buffers: Tensor) -> dict[str, Tensor]:
        """The module's buffers by name, the float ones from `buffers [B]`; copies."""
        integers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        floats = Model(torch.zeros(self.layout.num_parameters), buffers, integers)
        state = self.layout.restore(floats) if buffers.numel() else integers
        return {name: state[name].clone() for name in integers if name in state}

    def _call(self, parameters: Tensor, buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        layout = self.layout
        pieces = layout.split(parameters)
        weights = {entry.name: pieces[entry.name].to(entry.dtype) for entry in layout.parameters}
        outputs: Tensor = functional_call(self.module, {**weights, **buffers}, (inputs,))
        return outputs

    @contextmanager
    def _mode(self, statistics: bool) -> Iterator[None]:
        """Evaluation mode, but for BatchNorm's own `statistics`; dropout stays off, so nothing is random."""
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        for module in self.module.modules():
            if statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def batches_of(rows: Tensor, size: int) -> list[Tensor]:
    """`rows` in batches of `size`; a last one of a single row, too few for BatchNorm, joins the one before."""
    batches = list(rows.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


class Session:
    """Training on the proxy data. BatchNorm's statistics move as the batches pass."""

    def __init__(self, proxy: Proxy, buffers: dict[str, Tensor]) -> None:
        self._proxy = proxy
        self._state = buffers

    def loss(
        self, parameters: Tensor, rows: Tensor, targets: Tensor | None = None, temperature: Tensor | float = 1.0
    ) -> Tensor:
        """The loss at `rows`, differentiable in `parameters [P]`.

        `targets` of the rows may take the place of their own; outputs are multiplied by `temperature`.
        """
        with self._proxy._mode(statistics=True):
            outputs = self._proxy._call(parameters, self._state, self._proxy.inputs[rows])
        return self._proxy.loss(outputs * temperature, self._proxy.labels[rows] if targets is None else targets)

    @property
    def buffers(self) -> Tensor:
        """The float buffers now, `[B]`."""
        return self._proxy.layout.buffers_of(self._state)

    def fit(
        self, parameters: Tensor, rows: Tensor, targets: Tensor, *, epochs: int, batch_size: int, learning_rate: float,
        momentum: float = 0.9, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """`parameters [P]` after SGD on the examples at `rows [n]` with `targets [n]`, shuffled by `seed`."""
        vector = parameters.clone().requires_grad_()
        optimizer = torch.optim.SGD([vector], lr=learning_rate, momentum=momentum)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for batch in batches_of(torch.randperm(len(rows), generator=generator), batch_size):
                optimizer.zero_grad()
                self.loss(vector, rows[batch], targets[batch]).backward()
                optimizer.step()
        return vector.detach()
