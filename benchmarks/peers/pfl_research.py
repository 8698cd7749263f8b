"""The workload in pfl-research 0.6 (Apple), with its simulated backend; in one process or under torchrun."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import workload
from torch import nn

if not hasattr(torch.distributed, "reduce_op"):  # pfl uses it, and torch 2.13 has removed it
    torch.distributed.reduce_op = torch.distributed.ReduceOp

from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Module(nn.Module):
    """The interface of a model in pfl."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, inputs: Any, targets: Any, eval: bool = False) -> Any:
        return workload.loss(self.inner(inputs), targets)

    def metrics(self, inputs: Any, targets: Any, eval: bool = True) -> Any:
        with torch.no_grad():
            mean = workload.loss(self.inner(inputs), targets)
        return {"loss": Weighted(mean.item() * len(targets), len(targets))}


class Clock(TrainingProcessCallback):
    """Records when each round ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *, model: Any) -> Any:
        self.times.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.times.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    options = workload.options().parse_args()
    torch.set_num_threads(1 if "WORLD_SIZE" in os.environ else 2)
    inputs, targets = (torch.from_numpy(array).to(options.device) for array in workload.data(options.model))
    module = Module(workload.torch_model(options.model)).to(options.device)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
    users = FederatedDataset(
        lambda user: Dataset(raw_data=[inputs[user], targets[user]], user_id=str(user)),
        get_user_sampler("minimize_reuse", list(range(workload.CLIENTS))),
    )
    clock = Clock()
    rounds = options.warmup + options.rounds
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=options.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_learning_rate=workload.RATE, local_num_epochs=options.epochs, local_batch_size=options.batch
        ),
        NNEvalHyperParams(local_batch_size=1000),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
        workload.report(seconds, options.warmup, [p.detach().cpu().numpy() for p in module.parameters()])


main()
