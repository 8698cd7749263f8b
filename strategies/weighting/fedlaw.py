"""Weights learned on data of the server's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.proxy import Session
from corymb.strategies.core.reply import CLASS
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, one_of, positive
from corymb.strategies.weighting.coherence import coherence, label_coherence


@dataclass(frozen=True)
class FedLAW(SightedRule[None]):
    """Li et al. 2023, FedLAW: the mixture and the shrinking of it that lower the loss on proxy data most.

    The model is `gamma * sum(lambda_i * model_i)`, learned anew in each round by `epochs` of `optimizer` (adam
    or sgd) in batches of `batch_size`. `form` "exp" is softmax and exp, beginning at the shares of examples;
    "quad" squares, beginning uniform. `learn` "both", "gamma" or "lambda". `average` is FedLAW-SWA: first lambda,
    averaged over its last epochs, then gamma, for half of the epochs each. BatchNorm's statistics are
    estimated on the proxy data. The round's notes have gamma, the proxy loss, and the coherence of updates, and of
    labels where sites report them.
    """

    needs_proxy = True
    unanimous = False  # it shrinks
    shift_equivariant = False
    scale_equivariant = False
    buffers = "proxy"

    form: str = "exp"
    learn: str = "both"
    average: bool = False
    optimizer: str = "adam"
    learning_rate: float = 0.005
    epochs: int = 20
    batch_size: int = 128

    def __post_init__(self) -> None:
        one_of(("exp", "quad"), form=self.form)
        one_of(("both", "gamma", "lambda"), learn=self.learn)
        one_of(("adam", "sgd"), optimizer=self.optimizer)
        positive(learning_rate=self.learning_rate)
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        if self.average:
            at_least(14, epochs=self.epochs)  # lambda is averaged from the seventh of its half on
        if self.average and self.learn != "both":
            raise ValueError(f"average = True learns both; leave out learn = {self.learn!r}.")

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Learn lambda and gamma, then mix."""
        exp = self.form == "exp"
        clients = len(cohort.nodes)
        mixture = cohort.shares.log() if exp else torch.full((clients,), clients**-0.5, dtype=torch.float64)
        shrink = torch.zeros(1, dtype=torch.float64) if exp else torch.ones(1, dtype=torch.float64)
        session = cohort.proxy.session(cohort.buffers)
        if self.average:
            self._learn(cohort, session, (mixture, shrink), [mixture], self.epochs // 2, average=True)
            self._learn(cohort, session, (mixture, shrink), [shrink], self.epochs // 2)
        else:
            learned = {"both": [mixture, shrink], "gamma": [shrink], "lambda": [mixture]}[self.learn]
            self._learn(cohort, session, (mixture, shrink), learned, self.epochs)
        weights, gamma = self._weights(mixture, shrink)
        vector = cohort.mixed(weights).mul_(gamma)
        notes = {
            "gamma": float(gamma),
            "proxy-loss": cohort.proxy.loss_of(vector, session.buffers),
            "coherence": coherence(cohort.models, cohort.origin).mean,
        }
        counts = [numbers.nan_to_num() for name, numbers in cohort.metrics.items() if name.startswith(CLASS)]
        if counts:
            notes["label-coherence"] = float(label_coherence(torch.stack(counts, dim=1)).mean())
        return Mix(vector, weights=gamma * weights, notes=notes)

    def _weights(self, mixture: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
        """Lambda `[K]` and gamma `[1]`."""
        if self.form == "exp":
            return mixture.softmax(dim=0), shrink.exp()
        return mixture.square() / mixture.square().sum(), shrink.square()

    def _learn(
        self,
        cohort: Cohort,
        session: Session,
        both: tuple[Tensor, Tensor],
        learned: list[Tensor],
        epochs: int,
        average: bool = False,
    ) -> None:
        """Change the `learned` ones of `both` in place."""
        for parameter in learned:
            parameter.requires_grad_()
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(learned, self.learning_rate, (0.5, 0.999))
        else:
            optimizer = torch.optim.SGD(learned, self.learning_rate, momentum=0.9)
        late = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05) if average else None
        schedules = torch.optim.lr_scheduler
        early: torch.optim.lr_scheduler.LRScheduler = (
            schedules.CosineAnnealingLR(optimizer, T_max=100) if average else schedules.StepLR(optimizer, 20, 0.5)
        )
        seen: list[Tensor] = []
        for epoch in range(epochs):
            for rows in cohort.proxy.batches(self.batch_size):
                weights, gamma = self._weights(*both)
                vector = (gamma * weights).to(cohort.models.dtype) @ cohort.models
                optimizer.zero_grad()
                session.loss(vector, rows).backward()
                optimizer.step()
            if late is not None and epoch > 5:
                seen.append(learned[0].detach().clone())
                late.step()
            else:
                early.step()
        for parameter in learned:
            parameter.requires_grad_(False)
        if seen:
            learned[0].copy_(torch.stack(seen).mean(dim=0))
