"""The workload in FedJAX 0.0.17 (Google), with its federated averaging."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import workload

if not hasattr(jax, "tree_map"):  # fedjax uses it, and current jax has removed it
    jax.tree_map = jax.tree_util.tree_map
if not hasattr(jax, "device_put_sharded"):
    jax.device_put_sharded = jax.device_put_replicated = None

import fedjax


def scores(model: str, params: Any, images: Any) -> Any:
    if model == "cnn":
        images = images.reshape(-1, 28, 28, 1)
        for layer in (0, 2):
            images = jax.lax.conv_general_dilated(
                images, params[layer], (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
            )
            images = jax.nn.relu(images + params[layer + 1])
            images = jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        images = images.transpose(0, 3, 1, 2)
        params = params[4:]
    hidden = images.reshape(images.shape[0], -1)
    for layer in range(0, len(params) - 2, 2):
        hidden = jax.nn.relu(hidden @ params[layer].T + params[layer + 1])
    return hidden @ params[-2].T + params[-1]


def main() -> None:
    options = workload.options().parse_args()
    inputs, targets = workload.data()
    clients = fedjax.InMemoryFederatedData(
        {client: {"x": inputs[client], "y": targets[client].astype(np.int32)} for client in range(workload.CLIENTS)}
    )

    def loss(params: Any, batch: Any, _: Any) -> Any:
        chances = jax.nn.log_softmax(scores(options.model, params, batch["x"]))
        return -jnp.mean(jnp.take_along_axis(chances, batch["y"][:, None], 1))

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss),
        fedjax.optimizers.sgd(workload.RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(
            batch_size=options.batch, num_epochs=options.epochs, seed=0, skip_shuffle=options.ordered
        ),
    )
    state = algorithm.init([jnp.asarray(array) for array in workload.first_model(options.model)])

    def step(number: int) -> None:
        nonlocal state
        chosen = workload.cohort(number, options.clients)
        cohort = [(int(c), clients.get_client(int(c)), jax.random.PRNGKey(int(c))) for c in chosen]
        state, _ = algorithm.apply(state, cohort)
        jax.block_until_ready(state.params)

    seconds = workload.timed(step, options.warmup + options.rounds, time.perf_counter)
    workload.report(seconds, options.warmup, [np.asarray(array) for array in state.params])


main()
