"""One site's reply to a round, and what it reports of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """What one reply says about itself. All that a blind rule may look at.

    `node` is the site's persistent name, `examples` the number that it trained on (>= 0),
    `metrics` its finite scalars.
    """

    node: str
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """An admitted reply: finite, and of the layout of the round's model.

    `parts` are the parameters as flat pieces in the layout's order (any float dtype, P numbers in
    all), `buffers [B]` the float buffers.
    """

    report: Report
    parts: tuple[Tensor, ...]
    buffers: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, node: str, vector: Tensor, examples: int = 1, metrics: Mapping[str, float] | None = None) -> Reply:
        """A reply whose whole model is `vector [P]`."""
        return cls(Report(node, examples, metrics or {}), (vector,))
