"""A model taught by what the sites' models elect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, one_of, positive
from corymb.strategies.voting.election import Election, count, plurality, run_off


@dataclass(frozen=True)
class RunOffDistillation(SightedRule[None]):
    """Rezaei et al. 2023, Run-Off Election, as labels: train one model on what the round's models elect.

    Each site's model is a voter on the server's proxy inputs, whose own labels are not used. If at most `budget`
    sites are hostile, every input kept has the label that the honest sites would have given it: a certificate of
    `budget` or more. Where an elected class keeps fewer than `least` inputs, all inputs are used, and the
    note "certified" is 0. The student begins at the global model and is trained by SGD. The certificate is about
    this round's labels: it does not add up over rounds, and the student has none of its own.

    `election` is "run_off", "plurality", or "mean": the mean of the scores (FedDF), which one site can decide.
    """

    needs_proxy = True
    unanimous = False  # the student is another model
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"
    screens = False  # a broken model is a voter, too

    budget: int = 1
    least: int = 20
    election: str = "run_off"
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, budget=self.budget, least=self.least, momentum=self.momentum)
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        one_of(("run_off", "plurality", "mean"), election=self.election)
        positive(learning_rate=self.learning_rate)

    def tolerates(self, clients: int) -> int:
        """The student is bounded by its training, whatever the labels."""
        return 0 if self.election == "mean" else min(self.budget, (clients - 1) // 2)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Elect, keep what is certified, and teach."""
        labels, rows, notes = self.chosen(cohort.proxy.ballots(cohort.models, cohort.site_buffers))
        if cohort.proxy.targets is not None:
            notes["elected-accuracy"] = float((labels == cohort.proxy.targets).double().mean())
        student = cohort.proxy.session(cohort.buffers).fit(
            cohort.origin,
            rows,
            labels[rows],
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            seed=self.seed,
        )
        return Mix(student, notes=notes)

    def chosen(self, ballots: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The elected labels `[N]` for `ballots [V, N, C]`, the rows that are kept for teaching, and notes."""
        counted = count(ballots)
        if self.election == "mean":
            labels = ballots.double().nan_to_num().mean(dim=0).argmax(dim=1)
            elected = Election(labels, torch.full_like(labels, -1))
        else:
            elected = run_off(counted) if self.election == "run_off" else plurality(counted)
        kept = elected.certificates >= self.budget
        present = elected.classes.unique()
        enough = all(int((elected.classes[kept] == label).sum()) >= self.least for label in present)
        rows = kept.nonzero()[:, 0] if enough and kept.any() else torch.arange(len(kept))
        notes = {
            "certified": float(len(rows) == int(kept.sum())),
            "kept": float(kept.double().mean()),
            "median-certificate": float(elected.certificates.median()),
            "disagreement": float((plurality(counted).classes != elected.classes).double().mean()),
        }
        return elected.classes, rows, notes
