"""The length of each client's update, and its direction beside the step of the global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from corymb.strategies import Model, Reply, Report
from corymb.strategies.core.round_models import RoundModels

NORM, COSINE = "update-norm", "update-cosine"


def with_drift(replies: Sequence[Reply], origin: Model, moved: Model, known: Mapping[str, float]) -> dict[str, Report]:
    """Return the reports of `replies` by node, with the two metrics of drift.

    `update-norm` is the Euclidean length of the client's update, its parameters minus those of `origin`;
    `update-cosine` is the cosine between that and the step from `origin` to `moved`, left out where one of them is 0.
    A node that began from another model than `origin` has the length in `known`, and no cosine.
    """
    if not replies:
        return {}
    models = RoundModels([(reply.rows, reply.row) for reply in replies], origin.parameters)
    lengths, remainders = models.distances(origin.parameters), models.distances(moved.parameters)
    step = float((moved.parameters.double() - origin.parameters.double()).norm())
    products = (lengths.square() + step**2 - remainders.square()) / 2  # |u - d|^2 = |u|^2 + |d|^2 - 2 u d
    found = {}
    for reply, length, product in zip(replies, lengths.tolist(), products.tolist(), strict=True):
        node = reply.report.node
        metrics = {name: value for name, value in reply.report.metrics.items() if name != COSINE}
        metrics[NORM] = known.get(node, length)
        if node not in known and length * step > 0:
            metrics[COSINE] = min(1.0, max(-1.0, product / (length * step)))
        found[node] = replace(reply.report, metrics=metrics)
    return found
