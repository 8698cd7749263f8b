"""Rules by name, with their parameters checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from corymb.strategies.rule import Rule


def known_rules() -> dict[str, type[Rule[Any]]]:
    """Every rule by name: our own table, then what installed packages add."""
    return {name: _rule_class(name) for name in _names()}


def _names() -> list[str]:
    from corymb.strategies import RULES  # the table of contents imports this file

    return list(dict.fromkeys([*RULES, *entry_points(group="corymb.rules").names]))


def _rule_class(name: str) -> type[Rule[Any]]:
    from corymb.strategies import RULES

    if name in RULES:
        return RULES[name]
    try:
        found: type[Rule[Any]] = entry_points(group="corymb.rules")[name].load()
    except Exception as error:  # another package's code runs here
        raise ValueError(f"The rule {name!r} cannot be loaded: {type(error).__name__}: {error}.") from error
    return found


def make_rule(name: str, **parameters: Any) -> Rule[Any]:
    """The rule called `name` with `parameters`.

    A parameter that is a rule itself may be given as a name, or as a table with "name" and its parameters.
    Raises `ValueError` for a name or parameter that does not exist, listing those that do, and for a
    value out of range.
    """
    if name not in _names():
        raise ValueError(f"There is no rule {name!r}; the known rules are {', '.join(sorted(_names()))}.")
    kind = _rule_class(name)
    known = [field.name for field in fields(kind)]
    for parameter in parameters:
        if parameter not in known:
            has = f"its parameters are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"Rule {name!r} has no parameter {parameter!r}; {has}.")
    types = get_type_hints(kind)
    made, wrong = {}, []
    for parameter, value in parameters.items():
        kinds = _rules_in(types[parameter])
        made[parameter] = value = _rule(value) if kinds else value
        if kinds and not isinstance(value, kinds):
            wrong.append(f"{parameter}: {value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
        elif not kinds:
            try:
                TypeAdapter(types[parameter]).validate_python(value, strict=True)
            except ValidationError as error:
                wrong.append(f"{parameter}: {error.errors()[0]['msg']}")
    try:
        if not wrong:
            return kind(**made)
    except (TypeError, ValueError) as error:
        wrong.append(str(error).removesuffix("."))
    raise ValueError(f"Rule {name!r} cannot be made with {parameters}: {'; '.join(wrong)}.")


def _rules_in(kind: Any) -> tuple[type, ...]:
    """The classes of rules that a parameter of the type `kind` may be, and None's where it may; none for others."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    classes = tuple(get_origin(part) or part for part in parts)
    return classes if any(isinstance(part, type) and issubclass(part, Rule) for part in classes) else ()


def _rule(value: Any) -> Any:
    if isinstance(value, str):
        return make_rule(value)
    if isinstance(value, Mapping):
        parameters = dict(value)
        return make_rule(parameters.pop("name", ""), **parameters)
    return value
