"""Read experiments from TOML files and apply changes from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corymb.protocol.settings import keys_of
from corymb.simulations.data.kinds import CUSTOM
from corymb.simulations.experiments.experiment import Experiment
from corymb.strategies.core.registry import find_modules_in

SHIPPED = Path(__file__).parent / "shipped"


def shipped() -> list[str]:
    """Return the names of the experiments that ship with Corymb."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def read(path: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Return the experiment in `path`, or the shipped one of that name, with `changes {dotted key: value}` applied.

    Modules in the file's folder and in the current folder can be named in it. Raises `ValueError` that lists all
    problems with their keys.
    """
    file = next((p for p in (path, SHIPPED / path, SHIPPED / f"{path}.toml") if p.is_file()), None)
    if file is None:
        raise ValueError(f"There is no experiment {str(path)!r}; give a TOML file or one of: {', '.join(shipped())}.")
    try:
        table = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The experiment {file.name} is not valid TOML: {error}.") from None
    find_modules_in(file.parent)
    if base := table.pop("based_on", None):
        table = _merged(tomllib.loads((SHIPPED / f"{base}.toml").read_text()), table)
    for key, value in (changes or {}).items():
        _set(table, key, value)
    return Experiment(**{"name": file.stem, **table})


def parse_change(text: str) -> tuple[str, Any]:
    """Parse `key=value` into a key and a value.

    The value is read as TOML; if it is not valid TOML, it is a string. An empty value gives None, which removes the
    key from the experiment. Raises `ValueError` if the key or the "=" is missing.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"The setting {text!r} is not KEY=VALUE; write it like train.learning_rate=0.05.")
    if not value:
        return key, None
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _merged(base: dict[str, Any], over: dict[str, Any], *place: str) -> dict[str, Any]:
    """Return `base` with the keys of `over`, merged table by table; `place` is the path of this table."""
    base = _for_kind(base, over.get("kind"), *place)
    merged = {
        k: _merged(base[k], v, *place, k) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in over.items()
    }
    return base | merged


def _for_kind(table: dict[str, Any], kind: Any, *place: str) -> dict[str, Any]:
    """Return `table` without the keys that the new `kind` does not have; unchanged if the kind stays the same."""
    if kind is None or len(place) != 1 or kind == table.get("kind"):
        return table
    known = keys_of(Experiment, *place, kind) or keys_of(Experiment, *place, CUSTOM)
    return {key: value for key, value in table.items() if key in known} if known else table


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        outer, table = table, table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"The setting {key!r} cannot be changed, as {part!r} is not a table.")
        if last == "kind":
            table = outer[part] = _for_kind(table, value, *path)
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value
