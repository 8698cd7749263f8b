"""A model as one flat vector: which entries of a state dict are parameters, and how to put them back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise, starmap
from math import prod

import torch
from torch import Tensor

# BatchNorm's statistics: the only float buffers that a bare state dict lets us recognise, by their names.
STATISTICS = ("running_mean", "running_var")


class Role(StrEnum):
    """What an entry of a state dict is, and so how it is aggregated."""

    PARAMETER = "parameter"  # met by rules
    BUFFER = "buffer"  # float: averaged by the machine, never by a rule
    INTEGER = "integer"  # integer or bool: the server's value is kept, bit for bit


@dataclass(frozen=True)
class Entry:
    """One entry of a state dict; `start:stop` is its place in the flat vector of its role."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    start: int
    stop: int


@dataclass(frozen=True)
class Model:
    """A model taken apart: `parameters [P]`, float `buffers [B]`, and `integers` by name.

    Without a `layout` it is one layer called "".
    """

    parameters: Tensor
    buffers: Tensor = field(default_factory=lambda: torch.zeros(0))
    integers: Mapping[str, Tensor] = field(default_factory=dict)
    nonnegative: Tensor | None = None  # bool [B]: buffers that are variances
    layout: Layout | None = None

    def moved(self, parameters: Tensor, buffers: Tensor) -> Model:
        """This model with other `parameters` and `buffers`; variances are clamped at zero."""
        if self.nonnegative is not None:
            buffers = torch.where(self.nonnegative, buffers.clamp(min=0), buffers)
        return replace(self, parameters=parameters, buffers=buffers)

    @property
    def layers(self) -> Layout:
        """Its layout, or that of a single layer."""
        return self.layout or Layout.of({"": self.parameters})


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and roles of a state dict, in its order.

    The flat vector is float32, or float64 when a parameter is float64.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], buffers: Collection[str] | None = None) -> Layout:
        """The layout of `state`; `buffers` names its float buffers (default: BatchNorm's statistics).

        Raises `TypeError` for a dtype that is neither real nor integer.
        """
        entries = []
        ends = dict.fromkeys(Role, 0)
        for name, tensor in state.items():
            if tensor.is_complex():
                raise TypeError(
                    f"Tensor {name!r} has dtype {tensor.dtype}; rules average real numbers, so send its parts."
                )
            last = name.rpartition(".")[2]
            is_buffer = name in buffers if buffers is not None else last in STATISTICS
            role = Role.INTEGER if not tensor.is_floating_point() else Role.BUFFER if is_buffer else Role.PARAMETER
            start, ends[role] = ends[role], ends[role] + tensor.numel()
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, role, start, ends[role]))
        return cls(tuple(entries))

    @classmethod
    def of_module(cls, module: torch.nn.Module) -> Layout:
        """The layout of a module's state dict; what is no parameter of the module is a buffer."""
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state = module.state_dict()
        return cls.of(state, buffers=state.keys() - parameters)

    @cached_property
    def parameters(self) -> tuple[Entry, ...]:
        """The trainable entries."""
        return tuple(entry for entry in self.entries if entry.role is Role.PARAMETER)

    @cached_property
    def buffers(self) -> tuple[Entry, ...]:
        """The float buffers."""
        return tuple(entry for entry in self.entries if entry.role is Role.BUFFER)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat vector."""
        wide = any(entry.dtype == torch.float64 for entry in self.parameters)
        return torch.float64 if wide else torch.float32

    @cached_property
    def num_parameters(self) -> int:
        """P, the length of the flat vector."""
        return self.parameters[-1].stop if self.parameters else 0

    def flatten(self, state: Mapping[str, Tensor]) -> Model:
        """Take `state` (of this layout) apart; the result never shares memory with it."""
        variances = [torch.full((prod(entry.shape),), entry.name.endswith("running_var")) for entry in self.buffers]
        return Model(
            joined(self.parts(state), self.dtype, copy=True),
            self.buffers_of(state),
            {entry.name: state[entry.name].clone() for entry in self.entries if entry.role is Role.INTEGER},
            torch.cat(variances) if variances else None,
            self,
        )

    def vector(self, state: Mapping[str, Tensor]) -> Tensor:
        """The parameters of `state` as one vector: the memory that they lie in, if that is one piece, or a copy."""
        parts = self.parts(state)
        if _are_one(parts) and parts[0].dtype == self.dtype:
            return parts[0].as_strided((self.num_parameters,), (1,))
        return joined(parts, self.dtype)

    def parts(self, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The parameters of `state` as flat pieces in order, in their own dtypes and memory."""
        return tuple(state[entry.name].reshape(-1) for entry in self.parameters)

    def buffers_of(self, state: Mapping[str, Tensor]) -> Tensor:
        """The float buffers of `state` as one vector `[B]`."""
        return joined([state[entry.name].reshape(-1) for entry in self.buffers], self.dtype, copy=True)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of `vector [..., P]`, one per parameter: `{name: [..., *shape]}`."""
        return {
            entry.name: vector[..., entry.start : entry.stop].reshape(*vector.shape[:-1], *entry.shape)
            for entry in self.parameters
        }

    def restore(self, model: Model) -> dict[str, Tensor]:
        """The state dict that `flatten` took apart: names, shapes and dtypes as they were.

        Parameters of the vector's own dtype are views of it, not copies.
        """
        vectors = {Role.PARAMETER: model.parameters, Role.BUFFER: model.buffers}
        return {
            entry.name: model.integers[entry.name]
            if entry.role is Role.INTEGER
            else vectors[entry.role][entry.start : entry.stop].reshape(entry.shape).to(entry.dtype)
            for entry in self.entries
        }


def _are_one(parts: tuple[Tensor, ...]) -> bool:
    """Whether the flat `parts` lie one after another in memory, as `Layout.restore` has them."""

    def follows(part: Tensor, other: Tensor) -> bool:
        is_near = other.storage_offset() == part.storage_offset() + part.numel() and other.dtype == part.dtype
        return is_near and other.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()

    return bool(parts) and all(part.is_contiguous() for part in parts) and all(starmap(follows, pairwise(parts)))


def joined(parts: Sequence[Tensor], dtype: torch.dtype, copy: bool = False) -> Tensor:
    """The flat `parts` as one vector of `dtype`; a single part of that dtype is not copied unless asked."""
    if not parts:
        return torch.zeros(0, dtype=dtype)
    converted = [part.detach().to(dtype) for part in parts]
    if len(converted) > 1:
        return torch.cat(converted)
    return converted[0].clone() if copy else converted[0]
