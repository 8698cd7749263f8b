"""The trained models of a block of clients and the metrics of their training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.weight_forms import BlockParameter


@dataclass(frozen=True)
class Report:
    """Metrics of the training of K clients, each `[K]`.

    `losses` is the sum of the losses over all examples seen, `correct` the number of correct predictions among them
    (None if that has no meaning), `examples` their number and `steps` the number of steps. `bounds` is an upper bound
    on the absolute value of every parameter of a client; NaN if a parameter may be NaN. `buffers` are the models'
    buffers, `{name: [K, ...]}`.
    """

    losses: list[float]
    correct: list[float] | None
    examples: list[int]
    steps: list[int]
    bounds: list[float]
    buffers: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Seen:
    """The loss of each example before each step, `[S, K, B]` float64, and whether it was correct, if that is known."""

    losses: Tensor
    hits: Tensor | None

    @classmethod
    def of_logits(cls, logits: Tensor, targets: Tensor) -> Seen:
        """Return what outputs `[S, K * B, C]` mean for the classes `targets [S, K, B]`."""
        losses = -logits.log_softmax(dim=2).gather(2, targets.flatten(1)[..., None]).view_as(targets)
        return cls(losses.double(), (logits.argmax(dim=2).view_as(targets) == targets).double())


class SeenSteps:
    """Collects what is seen in each step by K `clients` with batches of up to `width` examples."""

    def __init__(self, clients: int, width: int) -> None:
        self._clients, self._width = clients, width
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] | None = []

    def add(self, losses: Tensor, hits: Tensor | None) -> None:
        """Add a step of the clients that still train; both are `[k * B]`."""
        self._losses.append(self._whole(losses))
        if hits is None:
            self._hits = None
        elif self._hits is not None:
            self._hits.append(self._whole(hits))

    def seen(self) -> Seen:
        """Return what was seen in all steps."""
        return Seen(torch.stack(self._losses), None if self._hits is None else torch.stack(self._hits))

    def _whole(self, values: Tensor) -> Tensor:
        padded = pad(values.double(), (0, self._clients * self._width - len(values)))
        return padded.view(self._clients, self._width)


@dataclass(frozen=True)
class BlockResult:
    """A trained block: its `parameters` in the model's order, each for all clients, and the `report`."""

    parameters: list[BlockParameter]
    report: Report
    device: torch.device

    @classmethod
    def of(
        cls,
        parameters: list[BlockParameter],
        seen: Seen,
        batches: Batches,
        buffers: Mapping[str, NDArray[Any]],
    ) -> BlockResult:
        """Build the result from what was `seen` before each step."""
        is_example = (batches.weights > 0).transpose(0, 1)
        hits = torch.zeros_like(seen.losses) if seen.hits is None else seen.hits
        sums = torch.where(is_example, torch.stack([seen.losses, hits]), 0.0).sum(dim=(1, 3))
        bounds = torch.stack([parameter.bound() for parameter in parameters]).amax(dim=0)
        examples = is_example.sum(dim=(0, 2)).tolist()
        loss_sums, correct_sums = sums.tolist()
        correct = None if seen.hits is None else correct_sums
        report = Report(loss_sums, correct, examples, batches.steps, bounds.tolist(), buffers)
        return cls(parameters, report, seen.losses.device)

    def weighted_update(self, weights: Tensor) -> Tensor:
        """Return `sum_k weights[k] * (model_k - start)`, `[P]`, for `weights [K]`; skips clients of weight 0."""
        has_all = bool((weights != 0).all())
        weights = weights.to(self.device)
        selected = slice(None) if has_all else weights.nonzero()[:, 0]
        return torch.cat(
            [parameter.weighted_update(weights, selected).flatten() for parameter in self.parameters]
        ).cpu()

    def squared_distances(self, offset: Tensor | None) -> Tensor:
        """Return `|model_k - start - offset|^2`, `[K]` float64; `offset [P]` is zero if None."""
        sizes = [parameter.size for parameter in self.parameters]
        offsets = [None] * len(sizes) if offset is None else offset.to(self.device).split(sizes)
        pairs = zip(self.parameters, offsets, strict=True)
        return torch.stack([parameter.squared_distances(part) for parameter, part in pairs]).sum(dim=0).cpu()

    def models(self, into: Tensor | None = None) -> Tensor:
        """Return every client's model, `[K, P]`; write them to the tensor `into`, on the same device, if given."""
        return torch.cat([parameter.dense().flatten(1) for parameter in self.parameters], dim=1, out=into).cpu()


def stack_steps(steps: list[Tensor], rows: int) -> Tensor:
    """Stack the outputs of all steps into `[S, rows, C]`, with zeros for the clients that have finished."""
    gaps = [rows - each.shape[0] for each in steps]
    return torch.stack([pad(each, (0, 0, 0, gap)) if gap else each for each, gap in zip(steps, gaps, strict=True)])
