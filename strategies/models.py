"""The models of one round: rows of a matrix, or in blocks of clients that answer for theirs until somebody looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from corymb.strategies.block import Block, InBlock
from corymb.strategies.fold import Fold, mixed
from corymb.strategies.geometry import norms
from corymb.strategies.layout import Model, joined
from corymb.strategies.reply import Reply


class Models(Protocol):
    """K models of P parameters each."""

    def rows(self) -> Tensor:
        """All of them, `[K, P]`."""

    def mixed(self, centre: Tensor, weights: Tensor) -> Tensor:
        """`centre + sum_k weights[k] * (models[k] - centre)`, `[P]` for `weights [K]`."""

    def distances(self, centre: Tensor) -> Tensor:
        """Of each from `centre [P]`, `[K]` float64, right to 1e-5."""


@dataclass(frozen=True)
class Written:
    """Rows of a matrix `[K, P]`."""

    models: Tensor

    def rows(self) -> Tensor:
        """See `Models`."""
        return self.models

    def mixed(self, centre: Tensor, weights: Tensor) -> Tensor:
        """See `Models`."""
        return mixed(centre, self.models, weights)

    def distances(self, centre: Tensor) -> Tensor:
        """See `Models`."""
        return norms(self.models, centre)


class Unwritten:
    """Models that all lie in blocks; written out once somebody asks for the rows."""

    def __init__(self, places: list[InBlock], origin: Tensor) -> None:
        self._places, self._origin = places, origin
        self._written: Written | None = None

    def rows(self) -> Tensor:
        """See `Models`."""
        if self._written is None:
            places, self._places = self._places, []
            self._written = Written(gathered(places, self._origin))
        return self._written.rows()

    def mixed(self, centre: Tensor, weights: Tensor) -> Tensor:
        """See `Models`."""
        if self._written is not None:
            return self._written.mixed(centre, weights)
        fold = Fold(Model(centre))
        for place, weight in zip(self._places, weights.tolist(), strict=True):
            fold.add_in_block(place, weight)
        return fold.model(1.0).parameters

    def distances(self, centre: Tensor) -> Tensor:
        """See `Models`."""
        if self._written is not None:
            return self._written.distances(centre)
        coming = {block: block.squares(centre) for block in dict.fromkeys(place.block for place in self._places)}
        squares = {block: answer() for block, answer in coming.items()}
        return torch.stack([squares[place.block][place.row] for place in self._places]).sqrt()


def models_of(replies: list[Reply], origin: Tensor) -> Models:
    """The models of `replies`, in order; empties the list, so that none is there twice once it is written out."""
    parts: list[Any] = [reply.parts for reply in replies]
    replies.clear()
    if parts and all(isinstance(part, InBlock) for part in parts):
        return Unwritten(parts, origin)
    return Written(gathered(parts, origin))


def gathered(parts: list[Any], origin: Tensor) -> Tensor:
    """Models that are given as parts, as rows `[K, P]` in the dtype of `origin [P]`; empties the list as it goes.

    Blocks write theirs at the same time.
    """
    models = torch.empty(len(parts), origin.numel(), dtype=origin.dtype)
    blocks: dict[Block, list[tuple[int, Tensor]]] = {}
    for row in models:
        part: Sequence[Tensor] = parts.pop(0)
        if isinstance(part, InBlock):
            blocks.setdefault(part.block, []).append((part.row, row))
        else:
            row.copy_(joined(part, row.dtype))
        del part
    coming = []
    while blocks:
        block, into = blocks.popitem()
        coming.append(block.write(into))
        del block
    for finish in coming:
        finish()
    return models
