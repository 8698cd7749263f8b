"""A block of clients after their training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from corymb.simulations.engine.batches import Batches
from corymb.simulations.engine.weight_forms import Piece


@dataclass(frozen=True)
class Report:
    """What K clients tell of their training: sums of losses and of right answers, examples and steps, each `[K]`.

    `bounds [K]` is what no parameter of theirs exceeds; NaN where one may be.
    """

    losses: list[float]
    correct: list[float]
    examples: list[int]
    steps: list[int]
    bounds: list[float]


@dataclass(frozen=True)
class BlockResult:
    """The clients' models, as the forms of their parameters in the model's order, and their report."""

    pieces: list[Piece]
    report: Report
    device: torch.device

    @classmethod
    def of(cls, pieces: list[Piece], scores: Tensor, targets: Tensor, batches: Batches) -> BlockResult:
        """From what the models gave at each step, `[S, K * B, C]`, and the `targets [S, K, B]`."""
        there = (batches.weights > 0).transpose(0, 1)
        losses = -scores.log_softmax(dim=2).gather(2, targets.flatten(1)[..., None]).view_as(there)
        right = scores.argmax(dim=2).view_as(there) == targets
        sums = torch.where(there, torch.stack([losses.double(), right.double()]), 0.0).sum(dim=(1, 3))
        bounds = torch.stack([piece.bound() for piece in pieces]).amax(dim=0)
        examples = there.sum(dim=(0, 2)).tolist()
        losses_of, right_of = sums.tolist()
        return cls(pieces, Report(losses_of, right_of, examples, batches.steps, bounds.tolist()), targets.device)

    def moved(self, weights: Tensor) -> Tensor:
        """`sum_k weights[k] * (model_k - start)`, `[P]`, for `weights [K]`; who has weight 0 is not looked at."""
        every = bool((weights != 0).all())
        weights = weights.to(self.device)
        kept = slice(None) if every else weights.nonzero()[:, 0]
        return torch.cat([piece.moved(weights, kept).flatten() for piece in self.pieces]).cpu()

    def squares(self, offset: Tensor | None) -> Tensor:
        """`|model_k - start - offset|^2`, `[K]` float64, for an `offset [P]` if there is one."""
        sizes = [piece.size for piece in self.pieces]
        offsets = [None] * len(sizes) if offset is None else offset.to(self.device).split(sizes)
        pairs = zip(self.pieces, offsets, strict=True)
        return torch.stack([piece.squares(part) for piece, part in pairs]).sum(dim=0).cpu()

    def models(self, into: Tensor | None = None) -> Tensor:
        """Every client's model `[K, P]`, written `into` a tensor on the same device if there is one."""
        return torch.cat([piece.written().flatten(1) for piece in self.pieces], dim=1, out=into).cpu()


def side_by_side(steps: list[Tensor], rows: int) -> Tensor:
    """`[S, rows, C]`, filled up with zeros where some clients have finished."""
    gaps = [rows - each.shape[0] for each in steps]
    return torch.stack([pad(each, (0, 0, 0, gap)) if gap else each for each, gap in zip(steps, gaps, strict=True)])
