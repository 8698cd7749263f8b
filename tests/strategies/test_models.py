"""Models that lie in blocks answer as those that are written out do, also where some of a block are missing."""

from __future__ import annotations

import torch

from corymb.simulations.engine.blocks import WrittenBlock
from corymb.strategies import Layout, Reply, Report
from corymb.strategies.block import InBlock
from corymb.strategies.models import Unwritten, Written, models_of

LAYOUT = Layout.of({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})


def replies() -> tuple[list[Reply], torch.Tensor]:
    """Five replies of two blocks with three clients each, in no order; and their models."""
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    blocks = [WrittenBlock(rows[:3], LAYOUT), WrittenBlock(rows[3:], LAYOUT)]
    order = [4, 0, 5, 2, 1]
    parts = [InBlock(blocks[number // 3], number % 3) for number in order]
    return [Reply(Report(str(n), 1), part) for n, part in zip(order, parts, strict=True)], rows[order]


def test_they_answer_alike() -> None:
    came, rows = replies()
    origin = torch.ones(9)
    models = models_of(came, origin)
    assert isinstance(models, Unwritten)
    assert came == []
    weights = torch.tensor([0.5, 0.0, -0.1, 2.0, 0.3])
    for _ in range(2):  # unwritten, then written
        for centre in (origin, rows[0]):
            expected = Written(rows)
            torch.testing.assert_close(models.mixed(centre, weights), expected.mixed(centre, weights))
            torch.testing.assert_close(models.distances(centre), expected.distances(centre), rtol=1e-5, atol=1e-9)
        assert torch.equal(models.rows(), rows)


def test_one_outside_of_the_blocks_has_all_written() -> None:
    came, rows = replies()
    came.insert(1, Reply.of("alone", torch.full((9,), 7.0)))
    models = models_of(came, torch.zeros(9))
    assert isinstance(models, Written)
    assert torch.equal(models.rows(), torch.cat([rows[:1], torch.full((1, 9), 7.0), rows[1:]]))
    assert came == []
