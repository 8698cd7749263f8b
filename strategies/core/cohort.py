"""All replies of one round together: the input of a sighted rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from corymb.strategies.core.geometry import BLOCK_SIZE
from corymb.strategies.core.layout import Entry, Layout, Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply
from corymb.strategies.core.round_models import RoundModels


@dataclass(frozen=True)
class Cohort:
    """All replies of one round, in the order of the node names.

    `origin [P]` is the model that the round began with, and `models [K, P]` are the clients' models, in its dtype.
    `examples [K]` float64 are the numbers of training examples. `metrics {name: [K]}` are float64, with NaN for a
    client that did not send the metric. `layout` cuts vectors into layers. `known` names all clients of the
    federation, absent ones included. `steps {node: [S, P]}` are the updates of single batches, for the clients that
    sent them. `buffers [B]` are the float buffers that the round began with, and `client_buffers [K, B]` those of the
    clients.
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
    client_buffers: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)
    _proxy: Proxy | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, origin: Model, replies: list[Reply], known: tuple[str, ...] = (), proxy: Proxy | None = None) -> Cohort:
        """Return the cohort of `replies`, in their order, with the round's `origin`. Empties the list `replies`."""
        reports = [reply.report for reply in replies]
        steps = {reply.report.node: reply.steps for reply in replies if reply.steps is not None}
        client_buffers = [reply.buffers for reply in replies]
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
            torch.stack(client_buffers) if client_buffers else torch.zeros(0, origin.buffers.numel()),
            _proxy=proxy,
        )

    @property
    def models(self) -> Tensor:
        """All models, `[K, P]`. In a simulation this copies every model; `mixed` and `distances` avoid the copy."""
        return self.round_models.matrix()

    @property
    def proxy(self) -> Proxy:
        """The server's proxy data and module. Raises `ValueError` if there are none; see `Rule.needs_proxy`."""
        if self._proxy is None:
            raise ValueError("This rule needs proxy data, but the server has none; set `proxy`.")
        return self._proxy

    @property
    def shares(self) -> Tensor:
        """Each client's share of the examples, `[K]`; equal shares if all clients report 0 examples."""
        total = self.examples.sum()
        return self.examples / total if total > 0 else torch.full_like(self.examples, 1 / len(self.nodes))

    def mixed(self, weights: Tensor, centre: Tensor | None = None) -> Tensor:
        """Return `centre + sum_k weights[k] * (models[k] - centre)`, `[P]`; the default `centre [P]` is the origin.

        For `weights [K]` that sum to one this is the weighted mean of the models.
        """
        return self.round_models.mixed(self.origin if centre is None else centre, weights)

    def distances(self, centre: Tensor) -> Tensor:
        """Return the Euclidean distance of each model from `centre [P]`, `[K]` float64."""
        return self.round_models.distances(centre)

    def by_columns(self, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `work(models [K, p]) -> [p]` to blocks of coordinates and return the joined results, `[P]`.

        The blocks are small, so `work` needs little scratch memory.
        """
        width = max(1, BLOCK_SIZE // len(self.nodes))
        return torch.cat([work(block) for block in self.models.split(width, dim=1)])

    def by_layer(self, work: Callable[[Cohort], Tensor]) -> Tensor:
        """Apply `work(cohort of one layer) -> [p]` to every layer and return the joined results, `[P]`.

        A layer is one tensor of the model; tensors without elements are left out. The `origin`, `models` and `steps` of
        its cohort are views of this one's.
        """
        return torch.cat([work(self._layer(entry)) for entry in self.layout.parameters if entry.stop > entry.start])

    def subset(self, rows: Sequence[int], round_models: RoundModels) -> Cohort:
        """Return the cohort of the clients at `rows`, with these models."""
        index, nodes = torch.tensor(rows), tuple(self.nodes[row] for row in rows)
        return replace(
            self,
            round_models=round_models,
            nodes=nodes,
            examples=self.examples[index],
            metrics={name: values[index] for name, values in self.metrics.items()},
            steps={node: steps for node, steps in self.steps.items() if node in nodes},
            client_buffers=self.client_buffers[index],
        )

    def _layer(self, entry: Entry) -> Cohort:
        columns = slice(entry.start, entry.stop)
        return replace(
            self,
            origin=self.origin[columns],
            round_models=RoundModels.of_matrix(self.models[:, columns]),
            layout=Layout((replace(entry, start=0, stop=entry.stop - entry.start),)),
            steps={node: steps[:, columns] for node, steps in self.steps.items()},
        )
