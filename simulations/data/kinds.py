"""Settings tables with a `kind`: each kind has its own keys, and a key of another kind is an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, Literal

from pydantic import Field

from corymb.protocol.settings import Settings
from corymb.strategies.core.registry import Registry

CUSTOM = "custom"


class CustomSettings(Settings):
    """A user's own implementation: `reference` is "module:name" or a name that an installed package registers.

    In a TOML file, the reference is written as the `kind`. `options` are passed to it as keyword arguments.
    """

    kind: Literal["custom"]
    reference: str
    """Written as the `kind`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class or function."""

    def call(self, registry: Registry[Any], *arguments: Any) -> Any:
        """Return what the implementation returns for `arguments` and the options.

        Raises `ValueError` if it does not take them. An exception of the implementation itself passes unchanged.
        """
        function = registry.find(self.reference)
        try:
            inspect.signature(function).bind(*arguments, **self.options)
        except TypeError as error:
            raise ValueError(f"{self.reference!r} does not take options = {self.options}: {error}.") from None
        return function(*arguments, **self.options)


def with_kind(default: str, known: Collection[str] = (), registry: Registry[Any] | None = None) -> Callable[[Any], Any]:
    """Return a function for `BeforeValidator` that sets a table's kind to `default` if it has none.

    With a `registry`, a kind that is not in `known` becomes kind "custom" with the original kind as `reference`. The
    function raises `ValueError` if that is neither in the registry nor of the form "module:name".
    """

    def complete(table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        kind = table.get("kind", default)
        if registry is not None and isinstance(kind, str) and kind not in (*known, CUSTOM):
            if ":" not in kind and kind not in registry.names():
                available = sorted({*known, *registry.names()})
                raise ValueError(f"kind = {kind!r} is unknown; choose one of {', '.join(available)}, or 'module:name'")
            return {**table, "kind": CUSTOM, "reference": kind}
        return {**table, "kind": kind}

    return complete
