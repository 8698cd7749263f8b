"""Models that lie in blocks answer as those that are written out do, also where some of a block are missing."""

from __future__ import annotations

import torch

from corymb.simulations.engine.blocks import WrittenBlock
from corymb.strategies import Cohort, Layout, NormClipping, Reply, Report
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


def test_a_client_may_come_twice() -> None:
    came, rows = replies()
    models = models_of([*came, came[2]], torch.zeros(9))
    weights, twice = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.cat([rows, rows[2:3]])
    torch.testing.assert_close(models.mixed(torch.zeros(9), weights), weights @ twice)
    assert torch.equal(models.rows(), twice)


def test_a_round_of_two_of_whom_one_has_diverged() -> None:
    """Numbers that the door admits, but whose squares float32 does not have."""
    rows = torch.full((2, 9), 0.1)
    rows[1] = 1e20
    block = WrittenBlock(rows, LAYOUT)
    for models in (
        models_of([Reply(Report(str(n), 1), InBlock(block, n)) for n in (0, 1)], torch.zeros(9)),
        Written(rows),
    ):
        cohort = Cohort(torch.zeros(9), models, ("0", "1"), torch.ones(2, dtype=torch.float64))
        vector, _ = NormClipping().mix(cohort, None)
        assert vector.isfinite().all()
