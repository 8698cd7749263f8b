"""`RoundModels` gives the same results for models in blocks as for a matrix, also if a block has missing replies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corymb.strategies import Cohort, NormClipping, Reply, Report
from corymb.strategies.core.round_models import RoundModels
from corymb.strategies.core.rows import Matrix


class Counted(Matrix):
    """A block that counts the calls of `copy_to`."""

    copies = 0

    def copy_to(self, targets: Sequence[tuple[int, Tensor]]):  # type: ignore[no-untyped-def]
        self.copies += 1
        return super().copy_to(targets)


def replies() -> tuple[list[Reply], Tensor, list[Counted]]:
    """Return five replies from two blocks of three clients each, out of order; their models; and the blocks."""
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    blocks = [Counted(rows[:3]), Counted(rows[3:])]
    order = [4, 0, 5, 2, 1]
    return [Reply(Report(str(n), 1), blocks[n // 3], n % 3) for n in order], rows[order], blocks


def test_blocks_give_the_same_results_as_a_matrix() -> None:
    received, rows, blocks = replies()
    origin = torch.ones(9)
    models = RoundModels.of(received, origin)
    assert received == []
    weights = torch.tensor([0.5, 0.0, -0.1, 2.0, 0.3])
    expected = RoundModels.of_matrix(rows)
    for copies in (0, 1):
        for centre in (origin, rows[0]):
            torch.testing.assert_close(models.mixed(centre, weights), expected.mixed(centre, weights))
            torch.testing.assert_close(models.distances(centre), expected.distances(centre), rtol=1e-5, atol=1e-9)
        assert [block.copies for block in blocks] == [copies, copies]
        assert torch.equal(models.matrix(), rows)
    assert [block.copies for block in blocks] == [1, 1]


def test_a_single_reply_may_lie_between_replies_of_blocks() -> None:
    received, rows, _ = replies()
    received.insert(1, Reply.of("alone", torch.full((9,), 7.0)))
    models, every = RoundModels.of(received, torch.zeros(9)), torch.cat([rows[:1], torch.full((1, 9), 7.0), rows[1:]])
    weights = torch.arange(6.0)
    torch.testing.assert_close(models.mixed(torch.zeros(9), weights), weights @ every)
    torch.testing.assert_close(models.distances(torch.ones(9)), (every - 1).norm(dim=1).double())
    assert torch.equal(models.matrix(), every)


def test_a_reply_may_occur_twice() -> None:
    received, rows, _ = replies()
    models = RoundModels.of([*received, received[2]], torch.zeros(9))
    weights, twice = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.cat([rows, rows[2:3]])
    torch.testing.assert_close(models.mixed(torch.zeros(9), weights), weights @ twice)
    assert torch.equal(models.matrix(), twice)


def test_norm_clipping_is_finite_if_one_of_two_models_has_diverged() -> None:
    """The door admits these numbers, but their squares overflow float32."""
    rows = torch.full((2, 9), 0.1)
    rows[1] = 1e20
    block = Matrix(rows)
    for models in (
        RoundModels.of([Reply(Report(str(n), 1), block, n) for n in (0, 1)], torch.zeros(9)),
        RoundModels.of([Reply.of(str(n), rows[n]) for n in (0, 1)], torch.zeros(9)),
        RoundModels.of_matrix(rows),
    ):
        cohort = Cohort(torch.zeros(9), models, ("0", "1"), torch.ones(2, dtype=torch.float64))
        assert NormClipping().mix(cohort, None).vector.isfinite().all()
