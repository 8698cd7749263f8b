"""The weighted sum behind every blind rule: folds replies as they arrive, in memory that does not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import fsum

import torch
from torch import Tensor

from corymb.strategies.block import Block, InBlock
from corymb.strategies.layout import Model
from corymb.strategies.reply import Reply

COMING = 3  # blocks whose sums are worked out while further replies are read
WAITED_FOR = 8  # blocks of which not all clients are here
BLOCK = 1 << 17  # numbers per step: scratch memory stays in the cache, and torch has work for all its threads


class Fold:
    """Sums `weight * (reply - origin)` over the replies that are added.

    Differences take the dtype of the origin and the sum is float64. Terms of 24 bits add up
    without rounding as long as they lie within 29 bits of one another, so float32 models come out
    the same in any order of arrival.
    """

    def __init__(self, origin: Model) -> None:
        self._origin = origin
        self._moved = torch.zeros(origin.parameters.numel(), dtype=torch.float64)
        self._buffers = torch.zeros(origin.buffers.numel(), dtype=torch.float64)
        self._scratch = torch.empty(BLOCK, dtype=origin.parameters.dtype)
        self._weights: list[float] = []
        self._examples = 0
        self._coming: deque[Callable[[], Tensor]] = deque()  # sums of blocks, in the order of the blocks
        self._blocks: dict[Block, dict[int, float]] = {}  # weights of the clients that came, until all have

    def add(self, reply: Reply, weight: float) -> None:
        """Fold one reply in with `weight`."""
        self._examples += reply.report.examples
        if isinstance(reply.parts, InBlock):  # of models without buffers
            self.add_in_block(reply.parts, weight)
            return
        self._weights.append(weight)
        self._buffers.add_(reply.buffers.double(), alpha=reply.report.examples)
        start = 0
        for part in reply.parts:
            for piece in part.split(BLOCK):
                stop = start + len(piece)
                difference = torch.sub(piece, self._origin.parameters[start:stop], out=self._scratch[: stop - start])
                self._moved[start:stop].add_(difference.mul_(weight))
                start = stop

    def add_in_block(self, parts: InBlock, weight: float) -> None:
        """A block answers its weighted sum by itself, once all of its clients are here, so that no order shows."""
        self._weights.append(weight)
        weights = self._blocks.setdefault(parts.block, {})
        weights[parts.row] = weights.get(parts.row, 0.0) + weight
        if len(weights) == parts.block.clients:
            self._take_block(parts.block)
        elif len(self._blocks) > WAITED_FOR:  # of some, not all were admitted
            self._take_block(next(iter(self._blocks)))

    def _take_block(self, block: Block) -> None:
        came = self._blocks.pop(block)
        weights = torch.tensor([came.get(index, 0.0) for index in range(block.clients)], dtype=torch.float64)
        self._coming.append(block.moves(weights, self._origin.parameters))
        if len(self._coming) > COMING:
            self._moved += self._coming.popleft()()

    @property
    def total(self) -> float:
        """The sum of the weights, exactly rounded, so that the order of arrival does not matter."""
        return fsum(self._weights)

    def model(self, scale: float) -> Model:
        """`origin + scale * sum`, with buffers averaged by size; the origin itself when nothing came."""
        if not self._weights:
            return self._origin
        for block in list(self._blocks):
            self._take_block(block)
        while self._coming:
            self._moved += self._coming.popleft()()
        moved = torch.empty_like(self._origin.parameters)
        pieces = zip(*(t.split(BLOCK) for t in (moved, self._origin.parameters, self._moved)), strict=True)
        for target, origin, total in pieces:
            target.copy_(total.mul_(scale).add_(origin))
        buffers = self._origin.buffers
        if self._examples:
            buffers = (self._buffers / self._examples).to(buffers.dtype)
        return self._origin.moved(moved, buffers)


def mixed(origin: Tensor, models: Tensor, weights: Tensor) -> Tensor:
    """`origin + sum_k weights[k] * (models[k] - origin)` for `models [K, P]`, summed in float64.

    A model with weight 0 is not looked at.
    """
    result = torch.empty_like(origin)
    weights = weights.double()
    kept = weights.nonzero()[:, 0]
    few, weights = len(kept) < len(models), weights[kept]
    size = BLOCK // max(1, len(kept)) or 1
    for start in range(0, origin.numel(), size):
        block = slice(start, start + size)
        differences = (models[kept, block] if few else models[:, block]).double() - origin[block].double()
        result[block] = weights @ differences + origin[block]
    return result
