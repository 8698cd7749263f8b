"""The models of one round, copied into a matrix only if a rule needs their values."""

from __future__ import annotations

import torch
from torch import Tensor

from corymb.strategies.core.allocation import empty_matrix
from corymb.strategies.core.reply import Reply
from corymb.strategies.core.rows import Matrix, Rows, SingleRow

Place = tuple[Rows, int]  # where a model is: a set of rows, and a row number in it


class RoundModels:
    """K models of P parameters each, in a fixed order. `like [P]` gives the dtype of `matrix()`."""

    def __init__(self, places: list[Place], like: Tensor) -> None:
        self._places = places
        self._like = like
        self._matrix: Tensor | None = None

    @classmethod
    def of(cls, replies: list[Reply], like: Tensor) -> RoundModels:
        """Return the models of `replies`. Empties the list, so that no model is in memory twice."""
        places = [(reply.rows, reply.row) for reply in replies]
        replies.clear()
        result = cls(places, like)
        if any(isinstance(rows, SingleRow) for rows, _ in places):  # its values are in memory already
            result.matrix()
        return result

    @classmethod
    def of_matrix(cls, models: Tensor) -> RoundModels:
        """Return the rows of `models [K, P]` as the models of a round."""
        result = cls([], models)
        result._set_matrix(models)
        return result

    def matrix(self) -> Tensor:
        """Return all models, `[K, P]`, in the dtype of the round's model."""
        if self._matrix is None:
            places, self._places = self._places, []
            return self._set_matrix(_copy_models(places, self._like))
        return self._matrix

    def mixed(self, centre: Tensor, weights: Tensor) -> Tensor:
        """Return `centre + sum_k weights[k] * (models[k] - centre)`, `[P]`, for `weights [K]`."""
        total = torch.zeros(centre.numel(), dtype=torch.float64)
        row_weights: dict[Rows, Tensor] = {}
        for (rows, row), weight in zip(self._places, weights.tolist(), strict=True):
            row_weights.setdefault(rows, torch.zeros(rows.count, dtype=torch.float64))[row] += weight
        pending = [rows.add_to(total, block_weights, centre) for rows, block_weights in row_weights.items()]
        for finish in pending:
            finish()
        return total.add_(centre).to(centre.dtype)

    def distances(self, centre: Tensor) -> Tensor:
        """Return the Euclidean distance of each model from `centre [P]`, `[K]` float64."""
        pending = {rows: rows.squared_distances(centre) for rows in dict.fromkeys(rows for rows, _ in self._places)}
        squares = {rows: finish() for rows, finish in pending.items()}
        return torch.stack([squares[rows][row] for rows, row in self._places]).sqrt()

    def _set_matrix(self, models: Tensor) -> Tensor:
        rows = Matrix(models)
        self._places = [(rows, row) for row in range(rows.count)]
        self._matrix = models
        return models


def _copy_models(places: list[Place], like: Tensor) -> Tensor:
    """Return the models at `places` as rows `[K, P]`. Empties the list. All blocks copy at the same time."""
    models = empty_matrix(len(places), like.numel(), like.dtype)
    targets: dict[Rows, list[tuple[int, Tensor]]] = {}
    for (rows, row), target in zip(places, models, strict=True):
        targets.setdefault(rows, []).append((row, target))
    places.clear()
    pending = []
    while targets:
        rows, row_targets = targets.popitem()
        pending.append(rows.copy_to(row_targets))
        del rows  # frees the copied models before the next ones are copied
    for finish in pending:
        finish()
    return models
