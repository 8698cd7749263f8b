"""The client algorithms by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corymb.client.algorithms.algorithm import ClientAlgorithm, Plain
from corymb.client.algorithms.apfl import APFL
from corymb.client.algorithms.ditto import Ditto
from corymb.client.algorithms.feddyn import FedDyn
from corymb.client.algorithms.fednova import FedNova
from corymb.client.algorithms.fedrep import FedRep
from corymb.client.algorithms.fine_tuning import FineTuning
from corymb.client.algorithms.moon import Moon
from corymb.client.algorithms.scaffold import Scaffold
from corymb.strategies.core.registry import Registry

ALGORITHMS: dict[str, type[ClientAlgorithm]] = {
    "scaffold": Scaffold,
    "feddyn": FedDyn,
    "fednova": FedNova,
    "moon": Moon,
    "ditto": Ditto,
    "apfl": APFL,
    "fedper": Plain,
    "fedrep": FedRep,
    "fedbn": Plain,
    "fine_tuning": FineTuning,
}
_registry: Registry[type[ClientAlgorithm]] = Registry("client algorithm", ALGORITHMS, "corymb.algorithms")
PLAIN = Plain()


def make_algorithm(name: str, options: Mapping[str, Any]) -> ClientAlgorithm:
    """Return the client algorithm called `name`, or at "module:Class"; plain local training for "".

    Raises `ValueError` for an unknown name, and for options that it does not take.
    """
    if not name:
        return PLAIN
    kind = _registry.find(name)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"The client algorithm {name!r} does not take options = {dict(options)}: {error}.") from None
