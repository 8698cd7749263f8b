"""Registries of objects that settings name: built-in ones, those of installed packages, and "module:name"."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name: those in `table`, then those that installed packages add in the entry-point `group`.

    `label` is the word for such an object in error messages, for example "rule".
    """

    def __init__(self, label: str, table: Mapping[str, T], group: str) -> None:
        self._label, self._table, self._group = label, table, group

    def names(self) -> list[str]:
        """Return all known names, the built-in ones first."""
        return list(dict.fromkeys([*self._table, *entry_points(group=self._group).names]))

    def find(self, name: str) -> T:
        """Return the object called `name`, or the object at the reference "module:name".

        Raises `ValueError` for an unknown name (the message lists the known ones) and if an import fails.
        """
        if name in self._table:
            return self._table[name]
        if ":" in name:
            imported: T = import_reference(name, self._label)
            return imported
        if name not in self.names():
            raise ValueError(unknown(f"Unknown {self._label}", name, self.names()))
        try:
            loaded: T = entry_points(group=self._group)[name].load()
        except Exception as error:  # the other package's code may raise anything
            raise ValueError(f"Cannot load the {self._label} {name!r}: {type(error).__name__}: {error}.") from error
        return loaded


def find_modules_in(folder: Path) -> None:
    """Let Python find the modules in `folder`, so that "module:name" can name the user's own code."""
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def import_reference(reference: str, label: str) -> Any:
    """Return the object at `reference`, "module:name"; `label` is the word for the object in error messages.

    Python then also finds modules in the current folder. Raises `ValueError` if the object cannot be imported, with the
    original exception as the cause.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ValueError(f"The {label} {reference!r} is not a reference; write it as 'module:name'.")
    find_modules_in(Path.cwd())
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # the imported code may raise anything
        problem = f"{type(error).__name__}: {error}".removesuffix(".")
        raise ValueError(f"The {label} {reference!r} cannot be imported ({problem}).") from error


def unknown(problem: str, name: object, known: list[str]) -> str:
    """Return an error message: `problem` with `name`, the most similar known name (if any) and all `known` names."""
    closest = get_close_matches(str(name), known, 3)
    closest.sort(key=lambda each: sorted(each) != sorted(str(name)))  # two letters in the wrong order are most likely
    suggestion = f" Did you mean {closest[0]!r}?" if closest else ""
    names = f"Known names: {', '.join(sorted(known))}." if known else "There are none."
    return f"{problem} {name!r}.{suggestion} {names}"
