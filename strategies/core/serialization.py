"""A rule's memory at rest: JSON for scalars, names and tuples, tensors beside it. Never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from torch import Tensor

M = TypeVar("M")
Json = Any
TENSOR = "$tensor"  # {"$tensor": name} stands for a tensor kept beside the JSON


def packed(memory: object) -> tuple[Json, dict[str, Tensor]]:
    """`memory` as JSON and tensors.

    Memory is None, a scalar, a string, a tensor, a set of strings, or a dataclass, tuple or string-keyed dict of these.

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
        if isinstance(value, frozenset):
            return sorted(value)
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        where = f"Memory field {place!r}" if place else "A rule's memory"
        raise TypeError(f"{where} is a {type(value).__name__}; keep scalars, strings, tensors, dataclasses and tuples.")

    return pack(memory, ""), tensors


def unpacked(initial: M, plain: Json, tensors: Mapping[str, Tensor]) -> M:
    """The memory that `packed` took apart; `initial` is the first memory and says of what types.

    A dataclass comes back as one where the first memory has it, or the type of its field names it.
    """

    def unpack(template: Any, value: Json) -> Any:
        if isinstance(value, dict):
            if value.keys() == {TENSOR}:
                return tensors[value[TENSOR]]
            if is_dataclass(template):  # or a class of them, for a field that was None at first
                kind: Any = template if isinstance(template, type) else type(template)
                kinds = _kinds(kind)
                before = {name: None if kind is template else getattr(template, name) for name in value}
                parts = {n: unpack(kinds[n] if before[n] is None else before[n], item) for n, item in value.items()}
                return kind(**parts)
            return {n: unpack(template.get(n) if isinstance(template, dict) else None, v) for n, v in value.items()}
        if isinstance(value, list):
            if isinstance(template, frozenset):
                return frozenset(value)
            templates = template if isinstance(template, tuple) and len(template) == len(value) else [None] * len(value)
            return tuple(unpack(t, item) for t, item in zip(templates, value, strict=True))
        return value

    result: M = unpack(initial, plain)
    return result


def _kinds(kind: Any) -> dict[str, Any]:
    """The dataclass that each field's type names, if it names one."""
    hints = get_type_hints(kind)
    found = {name: [c for c in (hint, *get_args(hint)) if isinstance(c, type)] for name, hint in hints.items()}
    return {f.name: next(filter(is_dataclass, found[f.name]), None) for f in fields(kind)}


def _under(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
