"""Rules: what one round's replies become. Pure mathematics on torch; no Flower, no I/O.

`RULES` is the one table of names; other packages add theirs in the entry-point group `corymb.rules`.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from corymb.strategies.fedau import FedAU
from corymb.strategies.fedavg import FedAvg
from corymb.strategies.ida import IDA
from corymb.strategies.layout import Layout, Model
from corymb.strategies.median import Median
from corymb.strategies.rule import (
    BlindRule,
    Cohort,
    ElectingRule,
    Electorate,
    Outcome,
    Reply,
    Report,
    Rule,
    SightedRule,
)
from corymb.strategies.trimmed_mean import TrimmedMean

__all__ = [
    "IDA",
    "RULES",
    "BlindRule",
    "Cohort",
    "ElectingRule",
    "Electorate",
    "FedAU",
    "FedAvg",
    "Layout",
    "Median",
    "Model",
    "Outcome",
    "Reply",
    "Report",
    "Rule",
    "SightedRule",
    "TrimmedMean",
    "known_rules",
    "make_rule",
]

RULES: dict[str, type[Rule[Any]]] = {
    "fedavg": FedAvg,
    "fedau": FedAU,
    "ida": IDA,
    "trimmed_mean": TrimmedMean,
    "median": Median,
}


def known_rules() -> dict[str, type[Rule[Any]]]:
    """Every rule by name: our own table, then what installed packages add."""
    return RULES | {point.name: point.load() for point in entry_points(group="corymb.rules") if point.name not in RULES}


def make_rule(name: str, **parameters: Any) -> Rule[Any]:
    """The rule called `name` with `parameters`.

    Raises `ValueError` for a name or parameter that does not exist, listing those that do, and for a
    value out of range.
    """
    rules = known_rules()
    if name not in rules:
        raise ValueError(f"There is no rule {name!r}; the known rules are {', '.join(sorted(rules))}.")
    known = [field.name for field in fields(rules[name])]
    for parameter in parameters:
        if parameter not in known:
            has = f"its parameters are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"Rule {name!r} has no parameter {parameter!r}; {has}.")
    types = get_type_hints(rules[name])
    wrong = []
    for parameter, value in parameters.items():
        try:
            TypeAdapter(types[parameter]).validate_python(value, strict=True)
        except ValidationError as error:
            wrong.append(f"{parameter}: {error.errors()[0]['msg']}")
    try:
        if not wrong:
            return rules[name](**parameters)
    except (TypeError, ValueError) as error:
        wrong.append(str(error).removesuffix("."))
    raise ValueError(f"Rule {name!r} cannot be made with {parameters}: {'; '.join(wrong)}.")
