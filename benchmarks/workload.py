"""The workload of all simulators: the same data, initial model, cohorts and steps, and a checksum of the result.

The data are images of noise in 10 classes, or text of noise, with 100 examples at each of 100 clients. Clients train
with plain SGD on cross-entropy, at a learning rate of 0.05, on their examples in a new order for each epoch or, with
the option --ordered, in the stored order. The module needs numpy only, so that each peer can import it in its own
environment.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLIENTS, EXAMPLES, RATE = 100, 100, 0.05
TEXT, TOKENS, LENGTH = ("gru_text", "lora"), 64, 32  # models of text, and the text's alphabet and length
Arrays = list[NDArray[np.float32]]
# For each layer: the shape of the weight, as in torch, and the number of inputs of an output.
SHAPES: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "softmax": [((10, 784), 784)],
    "mlp": [((200, 784), 784), ((10, 200), 200)],
    "cnn": [((32, 1, 5, 5), 25), ((64, 32, 5, 5), 800), ((512, 3136), 3136), ((10, 512), 512)],
}


def data(model: str = "mlp") -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return inputs and targets `[100, 100]` by client and example; the inputs are images `[100, 100, C, H, W]`.

    The models of `TEXT` get tokens `[100, 100, T]` of text drawn at random, and predict the next ones.
    """
    rng = np.random.default_rng(0)
    if model in TEXT:
        text = rng.integers(0, TOKENS, (CLIENTS, EXAMPLES, LENGTH + 1))
        return text[..., :-1].copy(), text[..., 1:].copy()
    shape = (3, 32, 32) if model.endswith("cifar") else (1, 28, 28)
    inputs = rng.standard_normal((CLIENTS, EXAMPLES, *shape), dtype=np.float32)
    return inputs, rng.integers(0, 10, (CLIENTS, EXAMPLES))


def loss(outputs: Any, targets: Any) -> Any:
    """Return the mean cross-entropy of scores `[B, C]`, or of `[B, T, C]` for the next tokens `[B, T]`."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs.transpose(1, -1) if targets.dim() > 1 else outputs, targets)


def cohort(number: int, clients: int) -> NDArray[np.int64]:
    """Return the clients of round `number`, counted from 0; Corymb draws the same ones with seed 0."""
    return np.array(sorted(random.Random(f"0/{number + 1}/train").sample(range(CLIENTS), clients)))


def first_model(model: str) -> Arrays:
    """Return weights and biases in turn, drawn uniformly within 1 / sqrt(number of inputs)."""
    rng = np.random.default_rng(1)
    arrays = []
    for shape, inputs in SHAPES[model]:
        bound = 1 / np.sqrt(inputs)
        arrays += [rng.uniform(-bound, bound, size).astype(np.float32) for size in (shape, shape[:1])]
    return arrays


def checksum(arrays: Iterable[NDArray[np.float32]]) -> float:
    """Return the sum of the absolute values, rounded to four decimals."""
    return round(float(sum(np.abs(array).sum(dtype=np.float64) for array in arrays)), 4)


def torch_model(model: str) -> Any:
    """Return the model as a torch module, always with the same parameters."""
    import torch
    from torch import nn

    if model not in SHAPES:
        return import_module("field_models").field_model(model)
    layers: dict[str, list[nn.Module]] = {
        "softmax": [nn.Flatten(), nn.Linear(784, 10)],
        "mlp": [nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)],
        "cnn": [
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
        ],
    }  # fmt: skip
    module = nn.Sequential(*layers[model])
    with torch.no_grad():
        for parameter, array in zip(module.parameters(), first_model(model), strict=True):
            parameter.copy_(torch.from_numpy(array))
    return module


def shared_state(module: Any) -> dict[str, Any]:
    """Return what travels: all entries of the state dict but the parameters that are not trained."""
    fixed = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in fixed}


def softmax(shape: tuple[int, ...], classes: int) -> Any:
    """Return the model; an experiment names this function in `model.kind`."""
    return torch_model("softmax")


def mlp(shape: tuple[int, ...], classes: int) -> Any:
    """Return the model; an experiment names this function in `model.kind`."""
    return torch_model("mlp")


def cnn(shape: tuple[int, ...], classes: int) -> Any:
    """Return the model; an experiment names this function in `model.kind`."""
    return torch_model("cnn")


def field(shape: tuple[int, ...], classes: int, name: str) -> Any:
    """Return a model of `field_models`; an experiment names this function in `model.kind`."""
    return torch_model(name)


def options() -> argparse.ArgumentParser:
    """Return the command line parser of the peers' scripts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ordered", action="store_true")
    return parser


def report(seconds: list[float], warmup: int, arrays: Iterable[NDArray[np.float32]]) -> None:
    """Print the seconds of the rounds after `warmup`, and the checksum, as one line of JSON."""
    print(json.dumps({"seconds": seconds[warmup:], "checksum": checksum(arrays)}), flush=True)


def timed(step: Callable[[int], None], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Run `step` for each round and return its seconds."""
    seconds = []
    for number in range(rounds):
        started = clock()
        step(number)
        seconds.append(clock() - started)
    return seconds


def median(seconds: list[float]) -> float:
    """Return the median of `seconds`, in milliseconds."""
    return 1000 * statistics.median(seconds)
