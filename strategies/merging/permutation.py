"""Hidden units have no order: permutations of them that bring one network close to another.

Weight matching of Git Re-Basin (Ainsworth, Hayase & Srinivasa 2023, Algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from corymb.strategies.core.layout import Layout

SWEEPS = 100
GAIN = 1e-12


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor whose units, each `block` entries long, `group` may reorder."""

    name: str
    axis: int
    group: int
    block: int = 1


def layer_axes(layout: Layout) -> list[Axis]:
    """The axes of a chain of linear and convolution layers, with biases and norms, in the order of `layout`.

    Each layer's outputs feed the next, channels before pixels where an image is flattened. Raises
    `ValueError` for layers that do not fit together so: branches, residuals, recurrent cells.
    """
    axes: list[Axis] = []
    group, units = -1, 0
    for entry in layout.parameters:
        if len(entry.shape) >= 2:
            if group >= 0:
                if entry.shape[1] % units:
                    raise ValueError(
                        f"Tensor {entry.name!r} has {entry.shape[1]} inputs after a layer of {units} units; "
                        "weight matching needs a plain chain of layers."
                    )
                axes.append(Axis(entry.name, 1, group, entry.shape[1] // units))
            group, units = group + 1, entry.shape[0]
        elif group < 0 or entry.shape != (units,):
            raise ValueError(
                f"Tensor {entry.name!r} of shape {list(entry.shape)} fits no layer of {units} units; "
                "weight matching needs a plain chain of layers."
            )
        axes.append(Axis(entry.name, 0, group))
    return [axis for axis in axes if axis.group < group]  # the last layer's outputs have an order


def match(
    layout: Layout, reference: Tensor, vector: Tensor, axes: list[Axis] | None = None, seed: int = 0
) -> list[Tensor]:
    """The permutation of each group of units that brings `vector [P]` closest to `reference [P]`.

    Groups are visited in an order drawn from `seed`, each solved exactly with the others held, until none gains.
    """
    axes = layer_axes(layout) if axes is None else axes
    fixed, moving = layout.split(reference.double()), layout.split(vector.double())
    sizes = {a.group: fixed[a.name].shape[a.axis] // a.block for a in axes}
    permutations = [torch.arange(sizes[group]) for group in range(len(sizes))]
    rng = np.random.default_rng(seed)
    for _ in range(SWEEPS):
        gained = False
        for group in rng.permutation(len(permutations)).tolist():
            similarity = torch.zeros(sizes[group], sizes[group], dtype=torch.float64)
            for axis in (a for a in axes if a.group == group):
                others = [a for a in axes if a.name == axis.name and a.group != group]
                moved = _reordered(moving[axis.name], others, permutations)
                similarity += _units(fixed[axis.name], axis) @ _units(moved, axis).T
            _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
            rows = torch.arange(sizes[group])
            gain = similarity[rows, torch.from_numpy(columns)].sum() - similarity[rows, permutations[group]].sum()
            if gain > GAIN:
                permutations[group] = torch.from_numpy(columns)
                gained = True
        if not gained:
            break
    return permutations


def permuted(layout: Layout, vector: Tensor, permutations: list[Tensor], axes: list[Axis] | None = None) -> Tensor:
    """`vector [P]` with its units reordered: the same function of its inputs."""
    axes = layer_axes(layout) if axes is None else axes
    tensors = layout.split(vector)
    moved = [_reordered(t, [a for a in axes if a.name == name], permutations) for name, t in tensors.items()]
    return torch.cat([tensor.reshape(-1) for tensor in moved])


def _units(tensor: Tensor, axis: Axis) -> Tensor:
    """A row of numbers per unit."""
    front = tensor.movedim(axis.axis, 0)
    return front.reshape(front.shape[0] // axis.block, -1)


def _reordered(tensor: Tensor, axes: list[Axis], permutations: list[Tensor]) -> Tensor:
    for axis in axes:
        order = permutations[axis.group]
        entries = (order[:, None] * axis.block + torch.arange(axis.block)).reshape(-1)
        tensor = tensor.index_select(axis.axis, entries)
    return tensor
