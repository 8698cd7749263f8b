"""Base class of all settings, which rejects unknown keys, and the formatting of its validation errors."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Settings(BaseModel):
    """A table of settings. An unknown key is an error. The docstring under a key is its entry in the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """Refuse true and false for a number, which pydantic takes for 1 and 0."""
        for key, kind in _fields(cls).items() if isinstance(values, dict) else ():
            kinds = _members(kind)
            if isinstance(values.get(key), bool) and (int in kinds or float in kinds) and bool not in kinds:
                raise ValueError(f"{key} = {str(values[key]).lower()} is not a number")
        return values


def problems(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> str:
    """Return all errors in a table of the type `kind`, joined by semicolons. `prefix` is put before each key."""
    return "; ".join(_problem(each, kind, prefix) for each in error.errors())


def keys_of(kind: type[BaseModel], *place: str) -> set[str]:
    """Return the keys of the table at `place` within a table of the type `kind`.

    If that table is a union of types, `place` ends with the `kind` that selects one of them.
    """
    return set(_fields(_at(kind, list(place))))


def _problem(error: Any, kind: type[BaseModel], prefix: str) -> str:
    path = [part for part, is_key in _keys(error["loc"], kind) if is_key]
    where = prefix + ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        *outer, last = error["loc"]
        table = _at(kind, outer)
        known = sorted(_fields(table))
        others = _members(_at(kind, outer[:-1]))
        if kinds := [tag for other in others for tag in sorted(_tags(other)) if last in _fields(other)]:
            return f"{where} is a key of kind = {' or '.join(map(repr, kinds))} only (known keys: {', '.join(known)})"
        near = _in_tables(table, str(last)) or get_close_matches(str(last), known, 1)
        return f"{where} is not a known key" + (
            f" (did you mean {' or '.join(map(repr, near))}?)"
            if near
            else f" (known keys: {', '.join(known)})" * bool(known)
        )
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if error["type"] == "missing":
        return f"{where} is required"
    return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(location: tuple[str | int, ...], kind: Any) -> Iterator[tuple[str | int, bool]]:
    """Yield each part of pydantic's error location, and whether it is a key. The tag of a union is not a key."""
    for part in location:
        members = _members(kind)
        tagged = [member for member in members if len(members) > 1 and part in _tags(member)]
        if tagged:
            kind = tagged[0]
            yield part, False
        else:
            kind = _inside(members, part)
            yield part, True


def _at(kind: Any, location: list[str | int]) -> Any:
    """Return the type of the table at `location`."""
    for part in location:
        members = _members(kind)
        tagged = [member for member in members if len(members) > 1 and part in _tags(member)]
        kind = tagged[0] if tagged else _inside(members, part)
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    """Return the keys of a table of the type `kind`, and the types of their values."""
    return {
        field.alias or name: field.annotation
        for member in _members(kind)
        if isinstance(member, type) and issubclass(member, BaseModel)
        for name, field in member.model_fields.items()
    }


def _in_tables(kind: Any, key: str) -> list[str]:
    """Return the places `table.key` of the tables in a table of the type `kind` that have this key."""
    return [f"{name}.{key}" for name, annotation in _fields(kind).items() if key in _fields(annotation)]


def _members(kind: Any) -> list[Any]:
    """Return the types that a value may have: the members of a union, or the one type; without annotations."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _members(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [member for each in get_args(kind) for member in _members(each)]
    return [kind]


def _tags(kind: Any) -> set[Any]:
    """Return the values of the key `kind` that select this type in a union."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and "kind" in kind.model_fields:
        annotation = kind.model_fields["kind"].annotation
        if get_origin(annotation) is Literal:
            return set(get_args(annotation))
        return {"custom"}
    return set()


def _inside(members: list[Any], part: str | int) -> Any:
    """Return the type of the value at `part`, a key or an index, of a table or list of one of the types `members`."""
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
            return member.model_fields[str(part)].annotation
        if get_origin(member) in (list, tuple, dict):
            return get_args(member)[-1 if get_origin(member) is dict else 0]
    return None
