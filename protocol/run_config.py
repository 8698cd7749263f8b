"""One dialect for settings: tables in a TOML file are flat scalars in Flower's run config.

Flower takes booleans, numbers and strings under dotted keys. A list of scalars travels as JSON, such as "[2, 3]"; a
list of tables as numbered tables, such as `rules.0.name`. A hyphen in a key is read as an underscore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Scalar = bool | int | float | str


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """`table` as a run config; `nest` is the inverse. What is None or an empty table is left out.

    Raises `ValueError` for a value that a run config cannot hold.
    """
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, (list, tuple)):
            flat[key] = json.dumps(value)
        elif isinstance(value, Path):
            flat[key] = str(value)
        elif isinstance(value, str) and isinstance(_listed(value), list):
            raise ValueError(f"The setting {key} = {value!r} would be read as a list; choose another text.")
        elif isinstance(value, (bool, int, float, str)):
            flat[key] = value
        elif value is not None:
            raise ValueError(f"The setting {key} is a {type(value).__name__}; give scalars, lists and tables.")
    return flat


def nest(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tables that a run config describes. Raises `ValueError` where a key is a value and a table at once."""
    tables: dict[str, Any] = {}
    for key, value in config.items():
        table = tables
        *path, last = key.replace("-", "_").split(".")
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(
                    f"The run config has {key!r}, which lies within another key; write that one as a table."
                )
        value = nest(value) if isinstance(value, Mapping) else _listed(value)
        if isinstance(table.get(last), dict) and not isinstance(value, dict):
            raise ValueError(f"The run config has {key!r} as a value and as a table; write the value inside the table.")
        table[last] = table.get(last, {}) | value if isinstance(value, dict) else value
    return {name: _numbered(value) for name, value in tables.items()}


def _listed(value: Any) -> Any:
    """A string that is a JSON list as that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _numbered(value: Any) -> Any:
    """A table whose keys count from 0 as a list, at any depth."""
    if not isinstance(value, dict):
        return value
    items = {key: _numbered(item) for key, item in value.items()}
    if items and set(items) == {str(place) for place in range(len(items))}:
        return [items[str(place)] for place in range(len(items))]
    return items
