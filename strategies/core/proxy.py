"""The server's proxy data and module, with which rules evaluate and train models."""

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
EVALUATION_BATCH = 1024  # examples per forward pass


@dataclass(frozen=True)
class Proxy:
    """Proxy data, examples that the server itself holds: `inputs [N, ...]`, and `targets [N]` if they are labelled.

    `module` gives the architecture only; models are passed as vectors of its `layout` (see `Layout.of_module`).
    `loss(outputs, targets)` returns the mean over the examples.
    """

    module: nn.Module
    inputs: Tensor
    targets: Tensor | None = None
    loss: Loss = nn.functional.cross_entropy

    def __post_init__(self) -> None:
        if not len(self.inputs):
            raise ValueError("The proxy data hold 0 examples; give at least 1, or choose a rule without proxy data.")
        if self.targets is not None and len(self.targets) != len(self.inputs):
            raise ValueError(
                f"The proxy data have {len(self.inputs)} inputs but {len(self.targets)} targets; "
                "give one target per input."
            )
        names = dict(self.module.named_parameters(remove_duplicate=False))
        if shared := names.keys() - dict(self.module.named_parameters()).keys():
            raise ValueError(
                f"The proxy's module shares the parameter {min(shared)!r} between layers; remove the weight sharing."
            )

    @cached_property
    def layout(self) -> Layout:
        """The layout of the module's state dict."""
        return Layout.of_module(self.module)

    @property
    def labels(self) -> Tensor:
        """The targets. Raises `ValueError` if the proxy data are unlabelled."""
        if self.targets is None:
            raise ValueError(
                "This rule needs labelled proxy data, but these have no targets; give one target per input."
            )
        return self.targets

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the row numbers of all examples, in order, in batches of `size`."""
        yield from batches_of(torch.arange(len(self.inputs)), size)

    def outputs(
        self, parameters: Tensor, buffers: Tensor, rows: Tensor | None = None, batch_statistics: bool = False
    ) -> Tensor:
        """Return the outputs of a model (`parameters [P]`, `buffers [B]`) on the examples at `rows` (default: all).

        The module is in evaluation mode; with `batch_statistics`, BatchNorm uses the statistics of these examples. The
        result is differentiable in `parameters`.
        """
        with self._mode(statistics=batch_statistics):
            inputs = self.inputs if rows is None else self.inputs[rows]
            return self._call(parameters, self._buffers(buffers), inputs)

    @torch.no_grad()
    def scores(self, parameters: Tensor, buffers: Tensor) -> Tensor:
        """Return the `outputs` for all examples, `[N, C]`, without gradients and in batches."""
        return torch.cat([self.outputs(parameters, buffers, rows) for rows in self.batches(EVALUATION_BATCH)])

    def class_scores(self, parameters: Tensor, buffers: Tensor) -> Tensor:
        """Return the `scores`. Raises `ValueError` unless they are scores of two or more classes, `[N, C]`."""
        scores = self.scores(parameters, buffers)
        if scores.dim() != 2 or scores.shape[1] < 2:
            raise ValueError(
                f"This rule needs scores of two or more classes, [N, C], and the module returns {[*scores.shape]}."
            )
        return scores

    def ballots(self, models: Tensor, buffers: Tensor) -> Tensor:
        """Return the scores of each of `models [V, P]` with its `buffers [V, B]`, `[V, N, C]`."""
        return torch.stack([self.class_scores(*voter) for voter in zip(models, buffers, strict=True)])

    def accuracy(self, parameters: Tensor, buffers: Tensor) -> float:
        """Return the share of examples whose highest score is that of their target."""
        return float((self.class_scores(parameters, buffers).argmax(dim=1) == self.labels).double().mean())

    @torch.no_grad()
    def loss_of(self, parameters: Tensor, buffers: Tensor) -> float:
        """Return the mean loss over all examples."""
        return float(self.loss(self.scores(parameters, buffers), self.labels))

    def session(self, buffers: Tensor) -> Session:
        """Return a session that trains models on these examples; BatchNorm's statistics start at `buffers [B]`."""
        return Session(self, self._buffers(buffers))

    def refreshed(self, parameters: Tensor, buffers: Tensor) -> Tensor:
        """Return `buffers [B]` with BatchNorm's statistics re-estimated for `parameters`, on these examples."""
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
                norm.momentum = None  # the statistics are then plain means over the batches
            with torch.no_grad(), self._mode(statistics=True):
                for rows in self.batches(EVALUATION_BATCH):
                    self._call(parameters, state, self.inputs[rows])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        return self.layout.buffers_of(state)

    def _buffers(self, buffers: Tensor) -> dict[str, Tensor]:
        """Return copies of the module's buffers by name; the float ones have the values of `buffers [B]`."""
        module_buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        model = Model(torch.zeros(self.layout.num_parameters), buffers, module_buffers)
        state = self.layout.restore(model) if buffers.numel() else module_buffers
        return {name: state[name].clone() for name in module_buffers if name in state}

    def _call(self, parameters: Tensor, buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        layout = self.layout
        pieces = layout.split(parameters)
        weights = {entry.name: pieces[entry.name].to(entry.dtype) for entry in layout.parameters}
        outputs: Tensor = functional_call(self.module, {**weights, **buffers}, (inputs,))
        return outputs

    @contextmanager
    def _mode(self, statistics: bool) -> Iterator[None]:
        """Put the module in evaluation mode for the duration of a `with` block.

        With `statistics`, BatchNorm layers are in training mode, so that they update their statistics. Dropout is
        always off, so the outputs are deterministic.
        """
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
    """Return `rows` in batches of `size`; a last batch of one row, too small for BatchNorm, joins the one before."""
    batches = list(rows.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


class Session:
    """A training session on the proxy data. Each training batch updates BatchNorm's statistics."""

    def __init__(self, proxy: Proxy, buffers: dict[str, Tensor]) -> None:
        self._proxy = proxy
        self._state = buffers

    def loss(
        self, parameters: Tensor, rows: Tensor, targets: Tensor | None = None, temperature: Tensor | float = 1.0
    ) -> Tensor:
        """Return the mean loss on the examples at `rows`, differentiable in `parameters [P]`.

        `targets` replace the examples' own targets. The outputs are multiplied by `temperature`.
        """
        with self._proxy._mode(statistics=True):
            outputs = self._proxy._call(parameters, self._state, self._proxy.inputs[rows])
        return self._proxy.loss(outputs * temperature, self._proxy.labels[rows] if targets is None else targets)

    @property
    def buffers(self) -> Tensor:
        """The current float buffers, `[B]`."""
        return self._proxy.layout.buffers_of(self._state)

    def fit(
        self, parameters: Tensor, rows: Tensor, targets: Tensor, *, epochs: int, batch_size: int, learning_rate: float,
        momentum: float = 0.9, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Return `parameters [P]` after SGD on the examples at `rows [n]` with `targets [n]`.

        `seed` determines the order of the examples in each epoch.
        """
        vector = parameters.clone().requires_grad_()
        optimizer = torch.optim.SGD([vector], lr=learning_rate, momentum=momentum)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for batch in batches_of(torch.randperm(len(rows), generator=generator), batch_size):
                optimizer.zero_grad()
                self.loss(vector, rows[batch], targets[batch]).backward()
                optimizer.step()
        return vector.detach()
