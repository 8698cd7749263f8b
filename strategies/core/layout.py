"""Models as flat vectors: which entries of a state dict are parameters, and how to restore the state dict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise, starmap
from math import prod

import torch
from torch import Tensor

# BatchNorm's statistics: the only float buffers that can be recognised by their names, without the module.
BATCH_NORM_STATISTICS = ("running_mean", "running_var")


class Role(StrEnum):
    """The role of an entry of a state dict, which decides how the entry is aggregated."""

    PARAMETER = "parameter"  # aggregated by the rule
    BUFFER = "buffer"  # float buffer: aggregated by the library, not by the rule
    INTEGER = "integer"  # integer or bool: the server keeps its own value


@dataclass(frozen=True)
class Entry:
    """One entry of a state dict. `start:stop` is its range in the flat vector of its role."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    start: int
    stop: int


@dataclass(frozen=True)
class Model:
    """A model, split by role: flat `parameters [P]`, flat float `buffers [B]`, and `integers` by name.

    A model without a `layout` counts as a single layer called "".
    """

    parameters: Tensor
    buffers: Tensor = field(default_factory=lambda: torch.zeros(0))
    integers: Mapping[str, Tensor] = field(default_factory=dict)
    nonnegative: Tensor | None = None  # bool [B]: True for buffers that are variances
    layout: Layout | None = None

    def moved(self, parameters: Tensor, buffers: Tensor) -> Model:
        """Return this model with new `parameters` and `buffers`; negative variances are set to zero."""
        if self.nonnegative is not None:
            buffers = torch.where(self.nonnegative, buffers.clamp(min=0), buffers)
        return replace(self, parameters=parameters, buffers=buffers)

    @property
    def layers(self) -> Layout:
        """The model's layout, or the layout of a single layer if it has none."""
        return self.layout or Layout.of({"": self.parameters})


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and roles of the entries of a state dict, in its order.

    The flat vector of parameters is float64 if any parameter is float64, else float32.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], buffers: Collection[str] | None = None) -> Layout:
        """Return the layout of `state`. `buffers` names its float buffers (default: BatchNorm's statistics).

        Raises `TypeError` for a complex dtype.
        """
        entries = []
        ends = dict.fromkeys(Role, 0)
        for name, tensor in state.items():
            if tensor.is_complex():
                raise TypeError(
                    f"Tensor {name!r} has dtype {tensor.dtype}; send its real and imaginary parts as two tensors."
                )
            local_name = name.rpartition(".")[2]
            is_buffer = name in buffers if buffers is not None else local_name in BATCH_NORM_STATISTICS
            role = Role.INTEGER if not tensor.is_floating_point() else Role.BUFFER if is_buffer else Role.PARAMETER
            start, ends[role] = ends[role], ends[role] + tensor.numel()
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, role, start, ends[role]))
        return cls(tuple(entries))

    @classmethod
    def of_module(cls, module: torch.nn.Module) -> Layout:
        """Return the layout of a module's state dict. Entries that are not parameters of the module are buffers."""
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state = module.state_dict()
        return cls.of(state, buffers=state.keys() - parameters)

    @cached_property
    def parameters(self) -> tuple[Entry, ...]:
        """The entries that are parameters."""
        return tuple(entry for entry in self.entries if entry.role is Role.PARAMETER)

    @cached_property
    def buffers(self) -> tuple[Entry, ...]:
        """The entries that are float buffers."""
        return tuple(entry for entry in self.entries if entry.role is Role.BUFFER)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat vector."""
        has_float64 = any(entry.dtype == torch.float64 for entry in self.parameters)
        return torch.float64 if has_float64 else torch.float32

    @cached_property
    def num_parameters(self) -> int:
        """P, the length of the flat vector."""
        return self.parameters[-1].stop if self.parameters else 0

    def flatten(self, state: Mapping[str, Tensor]) -> Model:
        """Return `state`, which must have this layout, as a model. The result shares no memory with `state`."""
        variances = [torch.full((prod(entry.shape),), entry.name.endswith("running_var")) for entry in self.buffers]
        return Model(
            joined(self.parts(state), self.dtype, copy=True),
            self.buffers_of(state),
            {entry.name: state[entry.name].clone() for entry in self.entries if entry.role is Role.INTEGER},
            torch.cat(variances) if variances else None,
            self,
        )

    def vector(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the parameters of `state` as one vector: a view if they are contiguous in memory, else a copy."""
        parts = self.parts(state)
        if _are_contiguous(parts) and parts[0].dtype == self.dtype:
            return parts[0].as_strided((self.num_parameters,), (1,))
        return joined(parts, self.dtype)

    def parts(self, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the parameters of `state` as flat tensors in order, in their own dtypes; views where possible."""
        return tuple(state[entry.name].reshape(-1) for entry in self.parameters)

    def buffers_of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the float buffers of `state` as one vector `[B]`."""
        return joined([state[entry.name].reshape(-1) for entry in self.buffers], self.dtype, copy=True)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of `vector [..., P]`, one per parameter: `{name: [..., *shape]}`."""
        return {
            entry.name: vector[..., entry.start : entry.stop].reshape((*vector.shape[:-1], *entry.shape))
            for entry in self.parameters
        }

    def restore(self, model: Model) -> dict[str, Tensor]:
        """Return the state dict of `model`, with the names, shapes and dtypes of this layout; inverts `flatten`.

        Parameters that have the dtype of the flat vector are views of it, not copies.
        """
        vectors = {Role.PARAMETER: model.parameters, Role.BUFFER: model.buffers}
        return {
            entry.name: model.integers[entry.name]
            if entry.role is Role.INTEGER
            else vectors[entry.role][entry.start : entry.stop].reshape(entry.shape).to(entry.dtype)
            for entry in self.entries
        }


def _are_contiguous(parts: tuple[Tensor, ...]) -> bool:
    """Return whether the flat `parts` follow one another in memory, as in a state dict from `Layout.restore`."""

    def is_next(part: Tensor, other: Tensor) -> bool:
        is_adjacent = other.storage_offset() == part.storage_offset() + part.numel() and other.dtype == part.dtype
        return is_adjacent and other.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()

    return bool(parts) and all(part.is_contiguous() for part in parts) and all(starmap(is_next, pairwise(parts)))


def joined(parts: Sequence[Tensor], dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Return the flat `parts` as one vector of `dtype`. A single part of that dtype is copied only with `copy`."""
    if not parts:
        return torch.zeros(0, dtype=dtype)
    converted = [part.detach().to(dtype) for part in parts]
    if len(converted) > 1:
        return torch.cat(converted)
    return converted[0].clone() if copy else converted[0]
