"""A rule's memory at rest: JSON for scalars, names and tuples, tensors beside it. Never pickled."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

M = TypeVar("M")
Json = dict[str, Any]


def packed(memory: object) -> tuple[Json, dict[str, Tensor]]:
    """`memory` (None, or a dataclass of scalars, strings, tuples of these, and tensors) as JSON and tensors."""
    if memory is None:
        return {}, {}
    if not is_dataclass(memory):
        raise TypeError(f"A rule's memory must be None or a dataclass, not {type(memory).__name__}.")
    values = {field.name: getattr(memory, field.name) for field in fields(memory)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    for name, value in plain.items():
        if not isinstance(value, (str, int, float, bool, tuple, type(None))):
            raise TypeError(f"Memory field {name!r} is a {type(value).__name__}; keep scalars, tuples and tensors.")
    return plain, tensors


def unpacked(initial: M, plain: Json, tensors: dict[str, Tensor]) -> M:
    """The memory that `packed` took apart; `initial` is the rule's first memory and says of what type."""
    if initial is None:
        return initial
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return type(initial)(**tuples, **tensors)
