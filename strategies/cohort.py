"""The replies of one round side by side: what a sighted rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corymb.strategies.fold import mixed
from corymb.strategies.layout import Model, joined
from corymb.strategies.reply import Reply

COLUMNS = 1 << 20  # numbers in a block of coordinates


@dataclass(frozen=True)
class Cohort:
    """The replies of one round side by side, in the order of the nodes' names.

    `models [K, P]` in the dtype of `origin [P]`, `examples [K]` float64, `metrics {name: [K]}`
    float64 with NaN where a site did not send one.
    """

    origin: Tensor
    models: Tensor
    nodes: tuple[str, ...]
    examples: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    _mixture: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, origin: Model, replies: list[Reply]) -> Cohort:
        """Gather `replies`, at least one and in order, around the round's `origin`; empties the list as it goes."""
        reports = [reply.report for reply in replies]
        models = torch.empty(len(replies), origin.parameters.numel(), dtype=origin.parameters.dtype)
        for row in models:
            row.copy_(joined(replies.pop(0).parts, row.dtype))  # so that no model is there twice
        names = sorted(set().union(*(report.metrics for report in reports)))
        return cls(
            origin.parameters,
            models,
            tuple(report.node for report in reports),
            torch.tensor([float(report.examples) for report in reports], dtype=torch.float64),
            {
                name: torch.tensor([r.metrics.get(name, float("nan")) for r in reports], dtype=torch.float64)
                for name in names
            },
        )

    def mixed(self, weights: Tensor) -> Tensor:
        """`origin + sum_k weights[k] * (models[k] - origin)`, `[P]`; for weights that sum to one, their mean.

        The weights of the mixture that a rule returns enter the run's record.
        """
        vector = mixed(self.origin, self.models, weights)
        self._mixture[:] = [vector, weights]
        return vector

    def by_columns(self, work: Callable[[Tensor], Tensor]) -> Tensor:
        """`work(models [K, p]) -> [p]` on blocks of coordinates, put together as `[P]`; scratch memory stays small."""
        width = max(1, COLUMNS // len(self.nodes))
        return torch.cat([work(block) for block in self.models.split(width, dim=1)])

    def weights_of(self, vector: Tensor) -> dict[str, float]:
        """The weights that made `vector`, by node; empty when `mixed` did not make it."""
        if not self._mixture or self._mixture[0] is not vector:
            return {}
        return dict(zip(self.nodes, self._mixture[1].tolist(), strict=True))
