"""Permutations of hidden units that bring one network close to another without changing its function.

Source: weight matching of Git Re-Basin (Ainsworth, Hayase & Srinivasa 2023, Algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corymb.strategies.core.layout import Layout

MAX_SWEEPS = 100  # sweeps over all groups of units
MIN_GAIN = 1e-12  # a permutation is accepted if it increases the similarity by more than this


@dataclass(frozen=True)
class Axis:
    """One axis of the tensor `name`, whose units the permutation of `group` reorders.

    Each unit is `block` entries long.
    """

    name: str
    axis: int
    group: int
    block: int = 1


def layer_axes(layout: Layout) -> list[Axis]:
    """Return the axes that can be permuted in a chain of linear and convolution layers, with biases and norms.

    The tensors of `layout` must be in the order of the layers, each of which feeds the next. Where an image is
    flattened, channels must come before pixels. Raises `ValueError` for layers that do not form such a chain:
    branches, residual connections, recurrent cells.
    """
    axes: list[Axis] = []
    group, units = -1, 0
    for entry in layout.parameters:
        if entry.start == entry.stop:
            continue
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
                f"Tensor {entry.name!r} of shape {list(entry.shape)} does not fit a layer of {units} units; "
                "weight matching needs a plain chain of layers."
            )
        axes.append(Axis(entry.name, 0, group))
    return [axis for axis in axes if axis.group < group]  # the outputs of the last layer keep their order


def match(
    layout: Layout, reference: Tensor, vector: Tensor, axes: list[Axis] | None = None, seed: int = 0
) -> list[Tensor]:
    """Return the permutation of each group of units that brings `vector [P]` closest to `reference [P]`.

    Each sweep visits the groups in a random order drawn with `seed`. It solves each group exactly while the others
    are fixed. The sweeps end when no group improves the similarity.
    """
    from scipy.optimize import linear_sum_assignment  # here, because it takes half a second to import

    axes = layer_axes(layout) if axes is None else axes
    fixed, moving = layout.split(reference.double()), layout.split(vector.double())
    sizes = {a.group: fixed[a.name].shape[a.axis] // a.block for a in axes}
    permutations = [torch.arange(sizes[group]) for group in range(len(sizes))]
    rng = np.random.default_rng(seed)
    for _ in range(MAX_SWEEPS):
        gained = False
        for group in rng.permutation(len(permutations)).tolist():
            similarity = torch.zeros(sizes[group], sizes[group], dtype=torch.float64)
            for axis in (a for a in axes if a.group == group):
                others = [a for a in axes if a.name == axis.name and a.group != group]
                moved = _reordered(moving[axis.name], others, permutations)
                similarity += _unit_rows(fixed[axis.name], axis) @ _unit_rows(moved, axis).T
            _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
            rows = torch.arange(sizes[group])
            gain = similarity[rows, torch.from_numpy(columns)].sum() - similarity[rows, permutations[group]].sum()
            if gain > MIN_GAIN:
                permutations[group] = torch.from_numpy(columns)
                gained = True
        if not gained:
            break
    return permutations


def permuted(layout: Layout, vector: Tensor, permutations: list[Tensor], axes: list[Axis] | None = None) -> Tensor:
    """Return `vector [P]` with its units reordered. The network computes the same function as before."""
    axes = layer_axes(layout) if axes is None else axes
    tensors = layout.split(vector)
    moved = [_reordered(t, [a for a in axes if a.name == name], permutations) for name, t in tensors.items()]
    return torch.cat([tensor.reshape(-1) for tensor in moved])


def _unit_rows(tensor: Tensor, axis: Axis) -> Tensor:
    """Return `tensor` as a matrix with one row per unit of `axis`."""
    front = tensor.movedim(axis.axis, 0)
    return front.reshape(front.shape[0] // axis.block, -1)


def _reordered(tensor: Tensor, axes: list[Axis], permutations: list[Tensor]) -> Tensor:
    """Return `tensor` with the units of `axes` reordered by the permutations of their groups."""
    for axis in axes:
        order = permutations[axis.group]
        entries = (order[:, None] * axis.block + torch.arange(axis.block)).reshape(-1)
        tensor = tensor.index_select(axis.axis, entries)
    return tensor
