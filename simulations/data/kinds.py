"""Tables that are told apart by their `kind`: each has keys of its own, and a key of another kind is an error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

from pydantic import Field

from corymb.protocol.settings import Settings
from corymb.strategies.core.registry import Registry

CUSTOM = "custom"


class CustomSettings(Settings):
    """Something of the user's own: `reference` is "module:name" or the name that an installed package gave it.

    In a file it is written as the `kind`. It is called with `options` beside what it is given.
    """

    kind: Literal["custom"]
    reference: str
    options: dict[str, Any] = Field(default_factory=dict)


def with_kind(default: str, known: Collection[str] = (), registry: Registry[Any] | None = None) -> Callable[[Any], Any]:
    """A validator that runs before a table is read: it fills in the `default` kind.

    With a `registry`, a kind that is not `known` becomes the custom one that refers to it.
    """

    def complete(table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        kind = table.get("kind", default)
        if registry is not None and isinstance(kind, str) and kind not in (*known, CUSTOM):
            if ":" not in kind and kind not in registry.names():
                own = sorted({*known, *registry.names()})
                raise ValueError(f"kind = {kind!r} is unknown; choose one of {', '.join(own)}, or 'module:name'")
            return {**table, "kind": CUSTOM, "reference": kind}
        return {**table, "kind": kind}

    return complete
