"""Experiments from TOML files, with changes from the command line."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from corymb.protocol.settings import keys_of, problems
from corymb.simulations.data.kinds import CUSTOM
from corymb.simulations.experiments.experiment import Experiment

SHIPPED = Path(__file__).parent / "shipped"


def shipped() -> list[str]:
    """The names of the experiments that come along."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def read(path: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment in `path`, or the shipped one of that name, with `changes {dotted key: value}` applied.

    From here on Python also finds modules in the file's folder and in the current one, for what the experiment names
    as "module:name". Raises `ValueError` listing everything that is wrong, with its place.
    """
    found = next((p for p in (path, SHIPPED / path, SHIPPED / f"{path}.toml") if p.is_file()), None)
    if found is None:
        raise ValueError(
            f"There is no experiment {str(path)!r}; give a TOML file or a shipped one: {', '.join(shipped())}."
        )
    try:
        table = tomllib.loads(found.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The experiment {found.name} is not valid TOML: {error}.") from None
    for folder in (found.parent, Path.cwd()):
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))
    if base := table.pop("based_on", None):
        table = _merged(tomllib.loads((SHIPPED / f"{base}.toml").read_text()), table)
    for key, value in (changes or {}).items():
        _set(table, key, value)
    try:
        return Experiment(**{"name": found.stem, **table})
    except ValidationError as error:
        raise ValueError(f"The experiment {found.name} is wrong: {problems(error, Experiment)}.") from None


def parse_change(text: str) -> tuple[str, Any]:
    """`key=value` with a TOML value; what is no TOML value is a string, and nothing after "=" removes the key (None).

    Raises `ValueError` without a "=".
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"The change {text!r} has no key and value; write it as train.learning_rate=0.05.")
    if not value:
        return key, None
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _merged(base: dict[str, Any], over: dict[str, Any], *place: str) -> dict[str, Any]:
    """`base` with the keys of `over`, table by table."""
    base = _of_kind(base, over.get("kind"), *place)
    both = {
        k: _merged(base[k], v, *place, k) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in over.items()
    }
    return base | both


def _of_kind(table: dict[str, Any], kind: Any, *place: str) -> dict[str, Any]:
    """`table` when it becomes one of another `kind`: without the keys that this kind does not have."""
    if kind is None or len(place) != 1 or kind == table.get("kind"):
        return table
    known = keys_of(Experiment, *place, kind) or keys_of(Experiment, *place, CUSTOM)
    return {key: value for key, value in table.items() if key in known} if known else table


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        outer, table = table, table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"The change {key!r} goes through {part!r}, which is no table.")
        if last == "kind":
            table = outer[part] = _of_kind(table, value, *path)
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value
