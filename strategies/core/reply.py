"""One site's reply to a round, and what it reports of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corymb.strategies.core.layout import joined
from corymb.strategies.core.rows import Rows, SingleRow

MOST_CLASSES = 10_000  # that a report is believed to have


@dataclass(frozen=True)
class Report:
    """What one reply says about itself: all that a blind rule may look at.

    `node` is the site's persistent name, `examples` the number that it trained on (>= 0), `metrics` its finite scalars.
    """

    node: str
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


CLASS = "examples-of-class-"  # of the metrics in which a site may say how many it has of each


def class_counts(report: Report) -> Tensor:
    """How many examples of each class the site reports, `[C]` float64; empty where it does not say."""
    named = {name.removeprefix(CLASS): value for name, value in report.metrics.items() if name.startswith(CLASS)}
    counts = {int(c): value for c, value in named.items() if c.isdecimal() and int(c) < MOST_CLASSES}
    return torch.tensor([counts.get(c, 0.0) for c in range(max(counts, default=-1) + 1)], dtype=torch.float64)


NO_BUFFERS = torch.zeros(0)


@dataclass(frozen=True)
class Reply:
    """An admitted reply: finite, and of the layout of the round's model.

    Its parameters are row number `row` of `rows`. `buffers [B]` are the float buffers, `steps [S, P]` the updates of
    its single batches where it sent them.
    """

    report: Report
    rows: Rows
    row: int = 0
    buffers: Tensor = NO_BUFFERS
    steps: Tensor | None = None

    @classmethod
    def of(
        cls,
        node: str,
        vector: Tensor,
        examples: int = 1,
        metrics: Mapping[str, float] | None = None,
        buffers: Tensor = NO_BUFFERS,
    ) -> Reply:
        """A reply whose parameters are `vector [P]`, and its float buffers `buffers [B]`."""
        return cls(Report(node, examples, metrics or {}), SingleRow((vector,)), buffers=buffers)

    @property
    def parts(self) -> Sequence[Tensor]:
        """The parameters as flat pieces in the layout's order, P numbers together."""
        return self.rows.pieces(self.row)

    def vector(self, dtype: torch.dtype) -> Tensor:
        """The parameters as one vector `[P]`; not a copy where they are one already."""
        return joined(self.parts, dtype)
