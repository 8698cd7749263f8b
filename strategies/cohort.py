"""The replies of one round side by side: what a sighted rule is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from corymb.strategies.geometry import COLUMNS
from corymb.strategies.layout import Entry, Layout, Model
from corymb.strategies.models import Models, Written, models_of
from corymb.strategies.proxy import Proxy
from corymb.strategies.reply import Reply


@dataclass(frozen=True)
class Cohort:
    """The replies of one round side by side, in the order of the nodes' names.

    `models [K, P]` in the dtype of `origin [P]`, of a `source` that may not have written them out yet;
    `examples [K]` float64, `metrics {name: [K]}` float64 with NaN where a site did not send one. `layout` cuts vectors
    into layers, `known` names all sites of the federation, `steps {node: [S, P]}` are the updates of single batches of
    the sites that sent them, `buffers [B]` the float buffers that the round began with and `site_buffers [K, B]` the
    sites'.
    """

    origin: Tensor
    source: Models
    nodes: tuple[str, ...]
    examples: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    layout: Layout = field(default_factory=lambda: Layout(()), repr=False)
    known: tuple[str, ...] = ()
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    site_buffers: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)
    notes: dict[str, float] = field(default_factory=dict)  # what a rule says of the round, by name
    _proxy: Proxy | None = field(default=None, repr=False, compare=False)
    _mixture: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, origin: Model, replies: list[Reply], known: tuple[str, ...] = (), proxy: Proxy | None = None) -> Cohort:
        """Gather `replies`, in order, around the round's `origin`; empties the list."""
        reports = [reply.report for reply in replies]
        steps = {reply.report.node: reply.steps for reply in replies if reply.steps is not None}
        site_buffers = [reply.buffers for reply in replies]
        models = models_of(replies, origin.parameters)
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
            origin.layers,
            known,
            steps,
            origin.buffers,
            torch.stack(site_buffers) if site_buffers else torch.zeros(0, origin.buffers.numel()),
            _proxy=proxy,
        )

    @property
    def models(self) -> Tensor:
        """All models, `[K, P]`. Clients of a simulation are written out for it: to mix, or to measure, asks less."""
        return self.source.rows()

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
        """`origin + sum_k weights[k] * (models[k] - origin)`, `[P]`; for weights that sum to one, their mean.

        The weights of the mixture that a rule returns enter the run's record, unless it is one around a `centre [P]`
        that takes the place of the origin.
        """
        if centre is not None:
            return self.source.mixed(centre, weights)
        vector = self.source.mixed(self.origin, weights)
        self._mixture[:] = [vector, weights]
        return vector

    def distances(self, centre: Tensor) -> Tensor:
        """Of each model from `centre [P]`, `[K]` float64."""
        return self.source.distances(centre)

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
            source=Written(self.models[:, piece]),
            layout=Layout((replace(entry, start=0, stop=entry.stop - entry.start),)),
            steps={node: steps[:, piece] for node, steps in self.steps.items()},
            _mixture=[],
        )

    def weights_of(self, vector: Tensor) -> dict[str, float]:
        """The weights that made `vector`, by node; empty when `mixed` did not make it."""
        if not self._mixture or self._mixture[0] is not vector:
            return {}
        return dict(zip(self.nodes, self._mixture[1].tolist(), strict=True))
