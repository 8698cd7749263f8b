"""Write docs/reference/keys.md from the settings classes: `python docs/make_keys.py`. A test compares the two."""

from __future__ import annotations

from datetime import date, time
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from corymb.client.gate.policy import SitePolicy
from corymb.server.deployment.federation import FederationSettings, ServerKit, SiteKit
from corymb.server.settings import ServerSettings
from corymb.simulations.experiments.experiment import Experiment

PAGE = Path(__file__).parent / "reference" / "keys.md"
INTRODUCTION = """# Keys

Every key of an experiment and of a deployment, generated from the code. A key that is not listed here is an error. In a
run config, an unknown key outside of all tables belongs to the app: the server logs that it ignores it, unless it
resembles a key of this list.

In an experiment's TOML file a dotted key is a key of a table: `train.steps` is `steps` under `[train]`. On the command
line, `--set train.steps=5` sets it, and `--set train.steps=` removes it.
"""
DEPLOYMENT = """
## The server in a deployment

`corymb.server.app:app` reads these keys from the run config: `[tool.flwr.app.config]` in the app's `pyproject.toml`, or
`flwr run --run-config`. Tables are dotted keys, and lists are JSON strings: `rules.candidate_election = '["median"]'`.
A site overrides `train.*` in its node config: `flower-supernode --node-config 'train.batch_size=8'`.
"""
SHARED = {"rules", "task", "train"}  # tables of a deployment that are those of an experiment
NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    dict: "table",
    Path: "path",
    date: "date",
    time: "time of day",
}


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_table_of(Experiment, "An experiment", "", level=2)]
    parts += [DEPLOYMENT, *_table_of(ServerSettings, "", "", level=2, shared=SHARED)]
    parts += _table_of(FederationSettings, "The file of a federation, for `corymb provision`", "", level=2)
    parts += _table_of(ServerKit, "kit.toml of a server", "", level=2)
    parts += _table_of(SiteKit, "kit.toml of a site", "", level=2)
    parts += _table_of(SitePolicy, "policy.toml of a site", "", level=2)
    return "\n".join(parts)


def _table_of(kind: type[BaseModel], title: str, prefix: str, level: int, shared: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """The section of one table: its keys, then the sections of the tables in it."""
    lines = [f"\n{'#' * level} {title}\n"] if title else []
    if prefix:
        lines.append(f"{_summary(kind)}\n")
    keys, tables = [], []
    for name, field in kind.model_fields.items():
        members = [member for member in _members(field.annotation) if _is_table(member)]
        if members and name not in shared:
            tables.append((name, members, getattr(field.default, "kind", None)))
        if not _is_tag(name, field):
            keys.append((name, field, members))
    if keys:
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(prefix + name, field, members) for name, field, members in keys]
    for name, members, default in tables:
        lines += _tables_of(name, members, default, prefix, level + 1)
    return lines


def _tables_of(name: str, members: list[type[BaseModel]], default: str | None, prefix: str, level: int) -> list[str]:
    """The sections of a table, one for each of its kinds. `default` is the kind of a table that names none."""
    if len(members) == 1:
        return _table_of(members[0], f"`{prefix}{name}`" if prefix else f"`[{name}]`", f"{prefix}{name}.", level)
    otherwise = f' The default is "{default}".' if default else ""
    lines = [f"\n{'#' * level} `[{name}]`\n", f"`kind` selects one of these tables, each with its own keys.{otherwise}"]
    for member in members:
        (tag,) = get_args(member.model_fields["kind"].annotation)
        title = '`kind = "module:name"`' if tag == "custom" else f'`kind = "{tag}"`'
        lines += _table_of(member, title, f"{prefix}{name}.", level + 1)
    return lines


def _is_tag(name: str, field: FieldInfo) -> bool:
    """Whether a key only says which kind of table this is."""
    is_one_word = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
    return name == "reference" or (name == "kind" and is_one_word)


def _row(key: str, field: FieldInfo, tables: list[Any]) -> str:
    meaning = " ".join((field.description or "").split())
    if isinstance(field.json_schema_extra, dict) and "default" in field.json_schema_extra:
        default = str(field.json_schema_extra["default"])
    elif field.is_required():
        default = "required"
    elif tables and not isinstance(field.default, (str, int, float, NoneType)):
        default = ""
    else:
        default = _literal(field.get_default(call_default_factory=True))
    cells = (f"`{key}`", _type(field), default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    """The values that a key takes, in words."""
    words = [_name(member) for member in _members(field.annotation) if member is not NoneType]
    bounds = []
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        bounds += [f"{sign} {getattr(rule, name):g}" for rule in field.metadata if hasattr(rule, name)]
    return " or ".join(dict.fromkeys(words)) + (f" {', '.join(bounds)}" if bounds else "")


def _name(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{_literal_text(value)}`" for value in get_args(kind))
    if origin in (list, tuple):
        inner = " or ".join(dict.fromkeys(_name(member) for member in _members(get_args(kind)[0])))
        return f"list of {inner}"
    if _is_table(kind) or origin is dict:
        return "table"
    return NAMES.get(kind, str(kind))


def _literal(value: Any) -> str:
    return "none" if value is None or value in ("", [], {}) else f"`{_literal_text(value)}`"


def _literal_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for each in get_args(kind) for member in _members(each)]
    if get_origin(kind) in (list, tuple) and _is_table(get_args(kind)[0]):
        return [get_args(kind)[0]]
    return [kind]


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _summary(kind: type[BaseModel]) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(page())
