"""The replies of one round side by side: what a sighted rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from corymb.strategies.core.geometry import COLUMNS
from corymb.strategies.core.layout import Entry, Layout, Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply
from corymb.strategies.core.round_models import RoundModels


@dataclass(frozen=True)
class Cohort:
    """The replies of one round side by side, in the order of the nodes' names.

    `models [K, P]` in the dtype of `origin [P]`; `examples [K]` float64, `metrics {name: [K]}` float64 with NaN where a
    site did not send one. `layout` cuts vectors into layers; `known` names all sites of the federation; `steps
    {node: [S, P]}` are the updates of single batches of the sites that sent them; `buffers [B]` are the float buffers
    that the round began with and `site_buffers [K, B]` the sites'.
    """

    origin: Tensor
    round_models: RoundModels
    nodes: tuple[str, ...]
    examples: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Layout = field(default_factory=lambda: Layout(()), repr=False)
    known: tuple[str, ...] = ()
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    site_buffers: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)
    _proxy: Proxy | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, origin: Model, replies: list[Reply], known: tuple[str, ...] = (), proxy: Proxy | None = None) -> Cohort:
        """Gather `replies`, in order, around the round's `origin`; empties the list."""
        reports = [reply.report for reply in replies]
        steps = {reply.report.node: reply.steps for reply in replies if reply.steps is not None}
        site_buffers = [reply.buffers for reply in replies]
        names = sorted(set().union(*(report.metrics for report in reports)))
        return cls(
            origin.parameters,
            RoundModels.of(replies, origin.parameters),
            tuple(report.node for report in reports),
            torch.tensor([float(report.examples) for report in reports], dtype=torch.float64),
            {
                name: torch.tensor([r.metrics.get(name, float("nan")) for r in reports], dtype=torch.float64)
                for name in names
            },
            origin.layers,
            known,
            steps,
            origin.buffers,
            torch.stack(site_buffers) if site_buffers else torch.zeros(0, origin.buffers.numel()),
            _proxy=proxy,
        )

    @property
    def models(self) -> Tensor:
        """All models, `[K, P]`. Those of a simulation are written out for it; `mixed` and `distances` need not."""
        return self.round_models.matrix()

    @property
    def proxy(self) -> Proxy:
        """The server's own data and model. Raises `ValueError` where there are none; see `Rule.needs_proxy`."""
        if self._proxy is None:
            raise ValueError("This rule needs proxy data at the server and there are none; give a proxy.")
        return self._proxy

    @property
    def shares(self) -> Tensor:
        """Each site's share of the examples, `[K]`; equal where nobody has any."""
        total = self.examples.sum()
        return self.examples / total if total > 0 else torch.full_like(self.examples, 1 / len(self.nodes))

    def mixed(self, weights: Tensor, centre: Tensor | None = None) -> Tensor:
        """`centre + sum_k weights[k] * (models[k] - centre)`, `[P]`, around the origin unless a `centre [P]` is given.

        For `weights [K]` that sum to one it is the weighted mean of the models.
        """
        return self.round_models.mixed(self.origin if centre is None else centre, weights)

    def distances(self, centre: Tensor) -> Tensor:
        """The distance of each model from `centre [P]`, `[K]` float64."""
        return self.round_models.distances(centre)

    def by_columns(self, work: Callable[[Tensor], Tensor]) -> Tensor:
        """`work(models [K, p]) -> [p]` on blocks of coordinates, put together as `[P]`; scratch memory stays small."""
        width = max(1, COLUMNS // len(self.nodes))
        return torch.cat([work(block) for block in self.models.split(width, dim=1)])

    def by_layer(self, work: Callable[[Cohort], Tensor]) -> Tensor:
        """`work(cohort of one layer) -> [p]` for every layer, put together as `[P]`.

        A layer is one tensor of the model: the part's `origin`, `models` and `steps` are views of it.
        """
        return torch.cat([work(self._part(entry)) for entry in self.layout.parameters])

    def _part(self, entry: Entry) -> Cohort:
        piece = slice(entry.start, entry.stop)
        return replace(
            self,
            origin=self.origin[piece],
            round_models=RoundModels.of_matrix(self.models[:, piece]),
            layout=Layout((replace(entry, start=0, stop=entry.stop - entry.start),)),
            steps={node: steps[:, piece] for node, steps in self.steps.items()},
        )
