"""Range checks of settings. Each check raises an error of one sentence that names the setting and its value."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite


def at_least(bound: float, **settings: float) -> None:
    """Raise `ValueError` unless every setting is at least `bound`."""
    for name, value in settings.items():
        if not value >= bound:
            raise ValueError(f"{name} is {value}; use at least {bound}.")


def positive(**settings: float) -> None:
    """Raise `ValueError` unless every setting is positive and finite."""
    for name, value in settings.items():
        if not (value > 0 and isfinite(value)):
            raise ValueError(f"{name} is {value}; use a positive and finite number.")


def share(**settings: float) -> None:
    """Raise `ValueError` unless every setting lies in [0, 1]."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; use a number in [0, 1].")


def one_of(choices: Collection[object], **settings: object) -> None:
    """Raise `ValueError` unless every setting is one of `choices`."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(str, choices))}.")
