"""Tables of settings that know all of their keys, and one sentence for everything that is wrong in them."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """A table of settings: a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problems(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> str:
    """Everything that is wrong with a table of this `kind`, with its place, as part of one sentence."""
    return "; ".join(_problem(each, kind, prefix) for each in error.errors())


def keys_of(kind: type[BaseModel], *place: str) -> set[str]:
    """The keys of the table at `place` in one of this type; where tables differ by kind, the place ends with a kind."""
    return _fields(kind, list(place))


def _problem(error: Any, kind: type[BaseModel], prefix: str) -> str:
    place = [part for part, is_key in _keys(error["loc"], kind) if is_key]
    where = prefix + ".".join(map(str, place)) or "the table"
    if error["type"] == "extra_forbidden":
        *outer, last = error["loc"]
        known = sorted(_fields(kind, outer))
        near = get_close_matches(str(last), known, 1)
        return f"{where} is no known key" + (
            f" (did you mean {near[0]!r}?)" if near else f" (known here: {', '.join(known)})" if known else ""
        )
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    if error["type"] == "missing":
        return f"{where}: field required"
    return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(location: tuple[str | int, ...], kind: Any) -> Iterator[tuple[str | int, bool]]:
    """Each part of pydantic's location, and whether it is a key: the tags of unions are not."""
    for part in location:
        members = _members(kind)
        tagged = [member for member in members if len(members) > 1 and part in _tags(member)]
        if tagged:
            kind = tagged[0]
            yield part, False
        else:
            kind = _inside(members, part)
            yield part, True


def _fields(kind: Any, location: list[str | int]) -> set[str]:
    """The keys of the table at `location`."""
    for part in location:
        members = _members(kind)
        tagged = [member for member in members if len(members) > 1 and part in _tags(member)]
        kind = tagged[0] if tagged else _inside(members, part)
    return {
        field.alias or name
        for member in _members(kind)
        if isinstance(member, type) and issubclass(member, BaseModel)
        for name, field in member.model_fields.items()
    }


def _members(kind: Any) -> list[Any]:
    """The types that a value may have, without annotations."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _members(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [member for each in get_args(kind) for member in _members(each)]
    return [kind]


def _tags(kind: Any) -> set[Any]:
    """The values of `kind` by which a table is told to be of this type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and "kind" in kind.model_fields:
        annotation = kind.model_fields["kind"].annotation
        if get_origin(annotation) is Literal:
            return set(get_args(annotation))
        return {"custom"}
    return set()


def _inside(members: list[Any], part: str | int) -> Any:
    """The type of what a table of one of these types has at `part`, or a list at any place."""
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
            return member.model_fields[str(part)].annotation
        if get_origin(member) in (list, tuple, dict):
            return get_args(member)[-1 if get_origin(member) is dict else 0]
    return None
