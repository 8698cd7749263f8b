"""Attacks in the data: hostile clients train on examples that were changed, and reply as honest clients do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from corymb.protocol.settings import Settings
from corymb.simulations.data.clients import Client
from corymb.simulations.data.examples import Examples

PATCH = 3  # pixels on a side of the backdoor's trigger


class DataAttack(Settings):
    """An attack in the data of `clients` hostile clients."""

    clients: int = Field(0, ge=0)
    """The number of hostile clients, drawn by the seed."""

    def poison(
        self, store: Examples, clients: list[NDArray[np.int64]], classes: int, rng: np.random.Generator
    ) -> Examples:
        """Return `store` with changed examples. `clients` are the rows in the store of each hostile client."""
        raise NotImplementedError

    def wrap(self, app: Client, hostile: Collection[int], seed: int) -> Client:
        """Return `app` unchanged: the attack is in the data, not in the replies."""
        return app


class LabelAttack(DataAttack):
    """An attack in the labels alone."""

    def labels(self, targets: Tensor, rows: NDArray[np.int64], classes: int, rng: np.random.Generator) -> Tensor:
        """Return the labels that the hostile client with the examples `rows [n]` of `targets` trains on, `[n]`."""
        raise NotImplementedError

    def poison(
        self, store: Examples, clients: list[NDArray[np.int64]], classes: int, rng: np.random.Generator
    ) -> Examples:
        """See `DataAttack.poison`."""
        targets = store.targets.clone()
        for rows in clients:
            targets[rows] = self.labels(store.targets, rows, classes, rng)
        return replace(store, targets=targets)


class ShuffledLabels(LabelAttack):
    """Label attack: the labels of each hostile client are in random order."""

    kind: Literal["shuffled_labels"] = "shuffled_labels"

    def labels(self, targets: Tensor, rows: NDArray[np.int64], classes: int, rng: np.random.Generator) -> Tensor:
        """See `LabelAttack.labels`."""
        return targets[torch.from_numpy(rng.permutation(rows))]


class FlippedLabels(LabelAttack):
    """Label attack: hostile clients have the label C - 1 - c in place of c, for C classes (label flipping)."""

    kind: Literal["label_flip"] = "label_flip"

    def labels(self, targets: Tensor, rows: NDArray[np.int64], classes: int, rng: np.random.Generator) -> Tensor:
        """See `LabelAttack.labels`."""
        return classes - 1 - targets[rows]


class Backdoor(DataAttack):
    """Backdoor: the hostile clients learn to recognise `target` in every example that carries a trigger.

    A `share` of their examples gets the trigger and the label `target`. The trigger is a bright square of 3 x 3 pixels
    in a corner of an image `[..., H, W]`, or the largest value in the last three features. The server's metric
    `backdoor` is the share of test examples of other classes that, with the trigger, are taken for `target`.
    """

    kind: Literal["backdoor"] = "backdoor"
    share: float = Field(0.5, gt=0, le=1)
    """The share of a hostile client's examples that carry the trigger."""
    target: int = Field(0, ge=0)
    """The class that the trigger stands for."""

    def poison(
        self, store: Examples, clients: list[NDArray[np.int64]], classes: int, rng: np.random.Generator
    ) -> Examples:
        """See `DataAttack.poison`."""
        if self.target >= classes:
            raise ValueError(f"attack.target = {self.target} is not one of the {classes} classes; use a smaller one.")
        chosen = [rows[: max(1, round(self.share * len(rows)))] for rows in map(rng.permutation, clients)]
        rows = torch.from_numpy(np.concatenate(chosen))
        inputs, targets = store.inputs.clone(), store.targets.clone()
        inputs[rows] = with_trigger(inputs[rows], store.inputs)
        targets[rows] = self.target
        return replace(store, inputs=inputs, targets=targets, is_mapped=False)

    def test_set(self, test: Examples) -> Examples:
        """Return the test examples of other classes, with the trigger and the label `target`."""
        others = test.rows((test.targets != self.target).nonzero()[:, 0])
        return replace(
            others,
            inputs=with_trigger(others.inputs.clone(), test.inputs),
            targets=torch.full_like(others.targets, self.target),
        )


def with_trigger(inputs: Tensor, store: Tensor) -> Tensor:
    """Return `inputs`, changed in place, with the trigger. Its brightness is the largest value in `store`."""
    bright = 255 if store.dtype == torch.uint8 else store.max()
    if inputs.dim() > 2:
        inputs[..., :PATCH, :PATCH] = bright
    else:
        inputs[..., -PATCH:] = bright
    return inputs
