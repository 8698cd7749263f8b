"""FedLAW: aggregation weights learned on the server's proxy data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.proxy import Session
from corymb.strategies.core.reply import CLASS_COUNT_PREFIX
from corymb.strategies.core.sighted import Mix, SightedRule
from corymb.strategies.core.validation import at_least, one_of, positive
from corymb.strategies.weighting.coherence import coherence, label_coherence


@dataclass(frozen=True)
class FedLAW(SightedRule[None]):
    """Li et al. 2023, FedLAW: learns the weights and the scale of the average that minimise the loss on proxy data.

    The model is `gamma * sum(lambda_i * model_i)`. Each round learns lambda and gamma from scratch, for `epochs`
    epochs of `optimizer` ("adam" or "sgd") in batches of `batch_size`. With `form` "exp", lambda is a softmax that
    starts at the shares of examples, and gamma is an exponential; with "quad" both are squares, and lambda starts
    uniform. `learn` is "both", "gamma" or "lambda". `average` is FedLAW-SWA: the first half of the epochs learns
    lambda and averages it over its last epochs, and the second half learns gamma. BatchNorm's statistics are
    estimated on the proxy data. The round's notes contain gamma, the proxy loss, the coherence of the updates, and
    the coherence of the labels if clients report class counts.
    """

    needs_proxy = True
    preserves_consensus = False  # gamma rescales the model
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
            at_least(14, epochs=self.epochs)  # lambda has half of the epochs and is averaged from its seventh on
        if self.average and self.learn != "both":
            raise ValueError(f"average = True learns both parameters, but learn is {self.learn!r}; leave learn out.")

    def mix(self, cohort: Cohort, memory: None) -> Mix[None]:
        """Learn lambda and gamma, then mix the models."""
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
        counts = [values.nan_to_num() for name, values in cohort.metrics.items() if name.startswith(CLASS_COUNT_PREFIX)]
        if counts:
            notes["label-coherence"] = float(label_coherence(torch.stack(counts, dim=1)).mean())
        return Mix(vector, weights=gamma * weights, notes=notes)

    def _weights(self, mixture: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
        """Return lambda `[K]` and gamma `[1]` from the learned tensors."""
        if self.form == "exp":
            return mixture.softmax(dim=0), shrink.exp()
        return mixture.square() / mixture.square().sum(), shrink.square()

    def _learn(
        self,
        cohort: Cohort,
        session: Session,
        variables: tuple[Tensor, Tensor],
        learned: list[Tensor],
        epochs: int,
        average: bool = False,
    ) -> None:
        """Train the tensors in `learned`, one or both of the `variables` of lambda and gamma, in place."""
        for parameter in learned:
            parameter.requires_grad_()
        if self.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(learned, self.learning_rate, (0.5, 0.999))
        else:
            optimizer = torch.optim.SGD(learned, self.learning_rate, momentum=0.9)
        swa_schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05) if average else None
        schedules = torch.optim.lr_scheduler
        schedule: torch.optim.lr_scheduler.LRScheduler = (
            schedules.CosineAnnealingLR(optimizer, T_max=100) if average else schedules.StepLR(optimizer, 20, 0.5)
        )
        snapshots: list[Tensor] = []
        for epoch in range(epochs):
            for rows in cohort.proxy.batches(self.batch_size):
                weights, gamma = self._weights(*variables)
                vector = (gamma * weights).to(cohort.models.dtype) @ cohort.models
                optimizer.zero_grad()
                session.loss(vector, rows).backward()
                optimizer.step()
            if swa_schedule is not None and epoch > 5:
                snapshots.append(learned[0].detach().clone())
                swa_schedule.step()
            else:
                schedule.step()
        for parameter in learned:
            parameter.requires_grad_(False)
        if snapshots:
            learned[0].copy_(torch.stack(snapshots).mean(dim=0))
