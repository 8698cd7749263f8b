"""The client algorithms by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from corymb.client.algorithms.algorithm import ClientAlgorithm, FedBN, FedPer, Plain
from corymb.client.algorithms.apfl import APFL
from corymb.client.algorithms.ditto import Ditto
from corymb.client.algorithms.feddyn import FedDyn
from corymb.client.algorithms.fednova import FedNova
from corymb.client.algorithms.fedrep import FedRep
from corymb.client.algorithms.fine_tuning import FineTuning
from corymb.client.algorithms.moon import Moon
from corymb.client.algorithms.scaffold import Scaffold
from corymb.strategies.core.registry import Registry, unknown

ALGORITHMS: dict[str, type[ClientAlgorithm]] = {
    "scaffold": Scaffold,
    "feddyn": FedDyn,
    "fednova": FedNova,
    "moon": Moon,
    "ditto": Ditto,
    "apfl": APFL,
    "fedper": FedPer,
    "fedrep": FedRep,
    "fedbn": FedBN,
    "fine_tuning": FineTuning,
}
_registry: Registry[type[ClientAlgorithm]] = Registry("client algorithm", ALGORITHMS, "corymb.algorithms")
PLAIN = Plain()


def algorithm_class(name: str) -> type[ClientAlgorithm]:
    """Return the class of the client algorithm called `name`, or the one at "module:Class".

    Raises `ValueError` for an unknown name, and for what is no such class.
    """
    found = _registry.find(name)
    if not (isinstance(found, type) and issubclass(found, ClientAlgorithm)):
        raise ValueError(f"{name!r} is a {type(found).__name__}; refer to a subclass of ClientAlgorithm.")
    return found


def make_algorithm(name: str, options: Mapping[str, Any]) -> ClientAlgorithm:
    """Return the client algorithm called `name`, or at "module:Class"; plain local training for "".

    Raises `ValueError` for an unknown name, and for options that it does not take.
    """
    if not name:
        return PLAIN
    kind = algorithm_class(name)
    known = [field.name for field in fields(kind)]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return kind(**values)
    except TypeError as error:
        if wrong := [key for key in options if key not in known]:
            raise ValueError(unknown(f"The client algorithm {name!r} has no option", wrong[0], known)) from None
        raise ValueError(f"The client algorithm {name!r} does not take options = {dict(options)}: {error}.") from None
