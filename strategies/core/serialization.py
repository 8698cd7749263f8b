"""Conversion of a rule's memory for storage: JSON for scalars, names and tuples, tensors beside it.

Reading it runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from torch import Tensor

M = TypeVar("M")
Json = Any
TENSOR = "$tensor"  # {"$tensor": name} in the JSON refers to a tensor stored beside it


def pack_memory(memory: object) -> tuple[Json, dict[str, Tensor]]:
    """Return `memory` as JSON and a dict of tensors; `unpack_memory` is the inverse.

    Memory is None, a scalar, a string, a tensor, a set of strings, or a dataclass, tuple or string-keyed dict of
    these.

    Raises `TypeError` for a value of any other type.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: object, path: str) -> Json:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {TENSOR: path}
        if is_dataclass(value):
            return {f.name: pack(getattr(value, f.name), _joined_path(path, f.name)) for f in fields(value)}
        if isinstance(value, tuple):
            return [pack(item, _joined_path(path, str(index))) for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {name: pack(item, _joined_path(path, name)) for name, item in value.items()}
        if isinstance(value, frozenset):
            return sorted(value)
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        field = f"Memory field {path!r}" if path else "A rule's memory"
        raise TypeError(f"{field} is a {type(value).__name__}; use scalars, strings, tensors, dataclasses or tuples.")

    return pack(memory, ""), tensors


def unpack_memory(initial: M, plain: Json, tensors: Mapping[str, Tensor]) -> M:
    """Return the memory that `pack_memory` converted to `plain` and `tensors`; `initial` is the rule's initial memory.

    A JSON object becomes a dataclass if `initial` has a dataclass in this place, or if the type annotation of the
    field names a dataclass.
    """

    def unpack(template: Any, value: Json) -> Any:
        if isinstance(value, dict):
            if value.keys() == {TENSOR}:
                return tensors[value[TENSOR]]
            if is_dataclass(template):  # an instance, or a class for a field that is None in `initial`
                cls: Any = template if isinstance(template, type) else type(template)
                types = _dataclass_types(cls)
                first = {name: None if cls is template else getattr(template, name) for name in value}
                parts = {n: unpack(types[n] if first[n] is None else first[n], item) for n, item in value.items()}
                return cls(**parts)
            return {n: unpack(template.get(n) if isinstance(template, dict) else None, v) for n, v in value.items()}
        if isinstance(value, list):
            if isinstance(template, frozenset):
                return frozenset(value)
            templates = template if isinstance(template, tuple) and len(template) == len(value) else [None] * len(value)
            return tuple(unpack(t, item) for t, item in zip(templates, value, strict=True))
        return value

    result: M = unpack(initial, plain)
    return result


def _dataclass_types(cls: Any) -> dict[str, Any]:
    """Return, for each field of `cls`, the dataclass that its type annotation names, or None."""
    hints = get_type_hints(cls)
    classes = {name: [c for c in (hint, *get_args(hint)) if isinstance(c, type)] for name, hint in hints.items()}
    return {f.name: next(filter(is_dataclass, classes[f.name]), None) for f in fields(cls)}


def _joined_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
