"""The journal: the on-disk record of a run, with its rounds, verdicts and models. Tables and plots read it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corymb.server.journal.journal import Journal
    from corymb.server.journal.rows import committed

__all__ = ["Journal", "committed"]
_PLACES = {"Journal": "journal", "committed": "rows"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, because torch takes seconds and pages need the names of tables only."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
