"""What settings may name: an entry of our own table, one that an installed package adds, or `module:name`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Things called `what` by name: those in `table`, then those in the entry-point `group` of installed packages."""

    def __init__(self, what: str, table: Mapping[str, T], group: str) -> None:
        self._what, self._table, self._group = what, table, group

    def names(self) -> list[str]:
        """Every known name, our own first."""
        return list(dict.fromkeys([*self._table, *entry_points(group=self._group).names]))

    def find(self, name: str) -> T:
        """What is called `name`, or what the reference `module:name` refers to.

        Raises `ValueError` for an unknown name, listing the known ones, and where an import fails.
        """
        if name in self._table:
            return self._table[name]
        if ":" in name:
            found: T = import_reference(name, self._what)
            return found
        if name not in self.names():
            raise ValueError(unknown(self._what, name, self.names()))
        try:
            loaded: T = entry_points(group=self._group)[name].load()
        except Exception as error:  # another package's code runs here
            raise ValueError(f"The {self._what} {name!r} cannot be loaded: {type(error).__name__}: {error}.") from error
        return loaded


def import_reference(reference: str, what: str) -> Any:
    """What `reference`, "module:name", refers to; `what` says in errors what it should be.

    Raises `ValueError` when it cannot be imported; the author's own exception is its cause.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ValueError(f"The {what} {reference!r} is no reference; write 'module:name'.")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # its own code runs here
        problem = f"{type(error).__name__}: {error}".removesuffix(".")
        raise ValueError(f"The {what} {reference!r} cannot be imported ({problem}).") from error


def unknown(what: str, name: object, known: list[str]) -> str:
    """One sentence for a `name` that is not among the `known` ones, with the nearest if one is near."""
    near = get_close_matches(str(name), known, 1)
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    return f"There is no {what} {name!r}{suggestion} The known ones are {', '.join(sorted(known))}."
