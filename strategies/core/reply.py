"""One client's reply in a round, and the report that comes with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corymb.strategies.core.layout import joined
from corymb.strategies.core.rows import Rows, SingleRow

MAX_CLASSES = 10_000  # counts that a client reports for classes with this or a higher number are ignored


@dataclass(frozen=True)
class Report:
    """The scalar part of one reply. A blind rule sees nothing else of the reply.

    `node` is the client's persistent name, `examples` the number of examples that it trained on (>= 0; a fraction if
    the client weighs itself so), and `metrics` its metrics by name, all finite. `left_out` names metrics that it sent
    and that are not finite numbers.
    """

    node: str
    examples: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def lacks(self, names: Collection[str]) -> str | None:
        """Return the first of `names` that is no metric with a number from `LEAST` to 1 / `LEAST`, or None."""
        return next((name for name in names if not LEAST <= self.metrics.get(name, 0.0) <= 1 / LEAST), None)


LEAST = 1e-12  # of a metric that a rule needs, so that dividing by it gives no infinity
CLASS_COUNT_PREFIX = "examples-of-class-"  # prefix of the metrics with a client's number of examples per class


def class_counts(report: Report) -> Tensor:
    """Return the reported number of examples of each class, `[C]` float64; empty if the client reports none."""
    reported = {
        name.removeprefix(CLASS_COUNT_PREFIX): value
        for name, value in report.metrics.items()
        if name.startswith(CLASS_COUNT_PREFIX)
    }
    counts = {int(c): value for c, value in reported.items() if c.isdecimal() and int(c) < MAX_CLASSES}
    return torch.tensor([counts.get(c, 0.0) for c in range(max(counts, default=-1) + 1)], dtype=torch.float64)


NO_BUFFERS = torch.zeros(0)


@dataclass(frozen=True)
class Reply:
    """A reply that passed the door: all values are finite, and it has the layout of the round's model.

    Its parameters are row number `row` of `rows`. `buffers [B]` are its float buffers. `steps [S, P]` are the updates
    of its single batches, if the client sent them.
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
        examples: float = 1,
        metrics: Mapping[str, float] | None = None,
        buffers: Tensor = NO_BUFFERS,
    ) -> Reply:
        """Return a reply with the parameters `vector [P]` and the float buffers `buffers [B]`."""
        return cls(Report(node, examples, metrics or {}), SingleRow((vector,)), buffers=buffers)

    @property
    def parts(self) -> Sequence[Tensor]:
        """The parameters as flat tensors in the layout's order, P numbers in total."""
        return self.rows.pieces(self.row)

    def vector(self, dtype: torch.dtype) -> Tensor:
        """Return the parameters as one vector `[P]` of `dtype`, without a copy if they already are such a vector."""
        return joined(self.parts, dtype)
