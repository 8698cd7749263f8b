"""A rule's memory at rest: JSON for scalars, names and tuples, tensors beside it. Never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

M = TypeVar("M")
Json = Any
TENSOR = "$tensor"  # {"$tensor": name} stands for a tensor kept beside the JSON


def packed(memory: object) -> tuple[Json, dict[str, Tensor]]:
    """`memory` as JSON and tensors.

    Memory is None, a scalar, a string, a tensor, or a dataclass, tuple or string-keyed dict of these. A dataclass
    within it comes back as one if it is there in the rule's first memory as well.

    Raises `TypeError` for anything else.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: object, place: str) -> Json:
        if isinstance(value, Tensor):
            tensors[place] = value
            return {TENSOR: place}
        if is_dataclass(value):
            return {f.name: pack(getattr(value, f.name), _under(place, f.name)) for f in fields(value)}
        if isinstance(value, tuple):
            return [pack(item, _under(place, str(index))) for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {name: pack(item, _under(place, name)) for name, item in value.items()}
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        where = f"Memory field {place!r}" if place else "A rule's memory"
        raise TypeError(f"{where} is a {type(value).__name__}; keep scalars, strings, tensors, dataclasses and tuples.")

    return pack(memory, ""), tensors


def unpacked(initial: M, plain: Json, tensors: Mapping[str, Tensor]) -> M:
    """The memory that `packed` took apart; `initial` is the rule's first memory and says of what types."""

    def unpack(template: Any, value: Json) -> Any:
        if isinstance(value, dict):
            if value.keys() == {TENSOR}:
                return tensors[value[TENSOR]]
            if is_dataclass(template) and not isinstance(template, type):
                return type(template)(**{name: unpack(getattr(template, name), v) for name, v in value.items()})
            return {name: unpack(None, item) for name, item in value.items()}
        if isinstance(value, list):
            templates = template if isinstance(template, tuple) and len(template) == len(value) else [None] * len(value)
            return tuple(unpack(t, item) for t, item in zip(templates, value, strict=True))
        return value

    result: M = unpack(initial, plain)
    return result


def _under(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
