"""Conversion between nested tables of settings, as in TOML, and the flat keys of Flower's run config.

Flower accepts booleans, numbers and strings under dotted keys. A list of scalars is written as a JSON string, such as
"[2, 3]"; a list of tables is written as numbered tables, such as `rules.0.name`. A hyphen in a key is read as an
underscore, but not in the name of a site.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SITES = "policy.enrolled."  # begins the keys whose last part is the name of a site
Scalar = bool | int | float | str


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return `table` as a run config, with `prefix` before each key. `nest` is the inverse.

    Values of None and empty tables are omitted. Raises `ValueError` for a value that a run config cannot hold.
    """
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, (list, tuple)):
            flat[key] = json.dumps(value)
        elif isinstance(value, Path):
            flat[key] = str(value)
        elif isinstance(value, str) and isinstance(_parse_list(value), list):
            raise ValueError(f"The setting {key} is {value!r}, which would be read as a list; use another string.")
        elif isinstance(value, (bool, int, float, str)):
            flat[key] = value
        elif value is not None:
            raise ValueError(f"The setting {key} is a {type(value).__name__}; use a scalar, a list or a table.")
    return flat


def nest(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested tables of a run config. Raises `ValueError` if a key is both a value and a table."""
    tables: dict[str, Any] = {}
    for key, value in _entries(config):
        table = tables
        *path, last = _parts(key)
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(
                    f"The run config has the key {key!r}, but {part!r} is a value; write {part!r} as a table."
                )
        if isinstance(table.get(last), dict):
            raise ValueError(f"The run config has {key!r} as a value and as a table; move the value into the table.")
        table[last] = _parse_list(value)
    return {name: _restore_lists(value) for name, value in tables.items()}


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of `config` that are no tables, with their dotted keys."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parts(key: str) -> list[str]:
    """Return the names of the tables of a dotted `key`, and the name in the last of them."""
    if key.startswith(SITES):
        return [*SITES.split(".")[:-1], key.removeprefix(SITES)]
    return key.replace("-", "_").split(".")


def _parse_list(value: Any) -> Any:
    """Return the list if `value` is a string with a JSON list, else `value`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _restore_lists(value: Any) -> Any:
    """Convert each table whose keys are 0, 1, 2, ... into a list, at any depth."""
    if not isinstance(value, dict):
        return value
    items = {key: _restore_lists(item) for key, item in value.items()}
    if items and set(items) == {str(index) for index in range(len(items))}:
        return [items[str(index)] for index in range(len(items))]
    return items
