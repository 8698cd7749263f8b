"""Distillation: one model trained on the labels that the clients' models elect."""

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
    """Rezaei et al. 2023, Run-Off Election, as labels: trains one model on the labels that the round's models elect.

    Each client's model is a voter on the server's proxy inputs; the labels of the proxy data are not used. The rule
    keeps the inputs whose certificate is at least `budget`: if at most `budget` clients are hostile, these inputs
    have the label that they would have without an attack. If fewer than `min_per_class` inputs of an elected class
    are kept, the rule uses all inputs, and the note "only-certified" is 0. The student starts from the global model
    and is trained by SGD. The certificates hold for the labels of this round only. They do not add up over rounds,
    and they do not cover the student's predictions.

    `election` is "run_off", "plurality", or "mean": the mean of the scores (FedDF), which one client can decide.
    """

    needs_proxy = True
    preserves_consensus = False  # the student differs from the clients' models
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"
    drops_non_finite = False  # a model with non-finite outputs remains a voter

    budget: int = 1
    min_per_class: int = 20
    election: str = "run_off"
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, budget=self.budget, min_per_class=self.min_per_class, momentum=self.momentum)
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        one_of(("run_off", "plurality", "mean"), election=self.election)
        positive(learning_rate=self.learning_rate)

    def tolerates(self, clients: int) -> int:
        """Return `budget`, or the largest minority if smaller; 0 for "mean".

        Whatever the labels, SGD bounds how far the student can move.
        """
        return 0 if self.election == "mean" else min(self.budget, (clients - 1) // 2)

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Elect labels, keep the certified ones, and train the student on them."""
        labels, rows, notes = self.chosen(cohort.proxy.ballots(cohort.models, cohort.client_buffers))
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
        """Return the elected labels `[N]` for `ballots [V, N, C]`, the rows to train on, and the notes."""
        counted = count(ballots)
        if self.election == "mean":
            labels = ballots.double().nan_to_num().mean(dim=0).argmax(dim=1)
            elected = Election(labels, torch.full_like(labels, -1))
        else:
            elected = run_off(counted) if self.election == "run_off" else plurality(counted)
        certified = elected.certificates >= self.budget
        present = elected.classes.unique()
        enough = all(int((elected.classes[certified] == label).sum()) >= self.min_per_class for label in present)
        rows = certified.nonzero()[:, 0] if enough and certified.any() else torch.arange(len(certified))
        notes = {
            "only-certified": float(len(rows) == int(certified.sum())),
            "certified-share": float(certified.double().mean()),
            "median-certificate": float(elected.certificates.median()),
            "disagreement": float((plurality(counted).classes != elected.classes).double().mean()),
        }
        return elected.classes, rows, notes
