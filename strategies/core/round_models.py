"""The models of one round side by side, written out once somebody asks for their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.strategies.core.reply import Reply
from corymb.strategies.core.rows import Matrix, Rows

Place = tuple[Rows, int]  # rows, and which of them


class RoundModels:
    """K models of P parameters each, in order; `like [P]` has the dtype in which they are written out."""

    def __init__(self, places: list[Place], like: Tensor) -> None:
        self._places = places
        self._like = like
        self._matrix: Tensor | None = None

    @classmethod
    def of(cls, replies: list[Reply], like: Tensor) -> RoundModels:
        """The models of `replies`; empties the list, so that no model is in memory twice."""
        places = [(reply.rows, reply.row) for reply in replies]
        replies.clear()
        return cls(places, like)

    @classmethod
    def of_matrix(cls, models: Tensor) -> RoundModels:
        """The rows of `models [K, P]`."""
        found = cls([], models)
        found._take(models)
        return found

    def matrix(self) -> Tensor:
        """All models, `[K, P]`, in the dtype of the round's model."""
        if self._matrix is None:
            places, self._places = self._places, []
            return self._take(_copied(places, self._like))
        return self._matrix

    def mixed(self, centre: Tensor, weights: Tensor) -> Tensor:
        """`centre + sum_k weights[k] * (models[k] - centre)`, `[P]`, for `weights [K]`."""
        total = torch.zeros(centre.numel(), dtype=torch.float64)
        by_rows: dict[Rows, Tensor] = {}
        for (rows, row), weight in zip(self._places, weights.tolist(), strict=True):
            by_rows.setdefault(rows, torch.zeros(rows.count, dtype=torch.float64))[row] += weight
        started = [rows.add_to(total, theirs, centre) for rows, theirs in by_rows.items()]
        for finish in started:
            finish()
        return total.add_(centre).to(centre.dtype)

    def distances(self, centre: Tensor) -> Tensor:
        """The distance of each model from `centre [P]`, `[K]` float64."""
        started = {rows: rows.squared_distances(centre) for rows in dict.fromkeys(rows for rows, _ in self._places)}
        squares = {rows: finish() for rows, finish in started.items()}
        return torch.stack([squares[rows][row] for rows, row in self._places]).sqrt()

    def _take(self, models: Tensor) -> Tensor:
        rows = Matrix(models)
        self._places = [(rows, row) for row in range(rows.count)]
        self._matrix = models
        return models


def _copied(places: list[Place], like: Tensor) -> Tensor:
    """The models at `places` as rows `[K, P]`; empties the list. Blocks copy theirs at the same time."""
    models = torch.empty(len(places), like.numel(), dtype=like.dtype)
    targets: dict[Rows, list[tuple[int, Tensor]]] = {}
    for (rows, row), target in zip(places, models, strict=True):
        targets.setdefault(rows, []).append((row, target))
    places.clear()
    started = []
    while targets:
        rows, theirs = targets.popitem()
        started.append(rows.copy_to(theirs))
        del rows  # so that what is copied leaves memory before the next is
    for finish in started:
        finish()
    return models
