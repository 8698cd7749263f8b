"""The table of all rules, and rules by name with their parameters checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from corymb.strategies.core.registry import Registry, unknown
from corymb.strategies.core.rule import Rule
from corymb.strategies.merging.fisher import FisherMerging
from corymb.strategies.merging.greedy_soup import GreedySoup
from corymb.strategies.merging.isotropic import IsoC, IsoCTS
from corymb.strategies.merging.layerwise import Layerwise
from corymb.strategies.merging.learned_soup import LearnedSoup
from corymb.strategies.merging.model_stock import ModelStock
from corymb.strategies.merging.weight_matching import WeightMatching
from corymb.strategies.participation.fedau import FedAU
from corymb.strategies.participation.fedavg import FedAvg
from corymb.strategies.participation.fedvarp import FedVARP
from corymb.strategies.participation.known_participation import KnownParticipation
from corymb.strategies.participation.mifa import MIFA
from corymb.strategies.robust.bulyan import Bulyan
from corymb.strategies.robust.clipping import CentredClipping, NormClipping
from corymb.strategies.robust.fltrust import FLTrust
from corymb.strategies.robust.foolsgold import FoolsGold
from corymb.strategies.robust.geometric_median import GeometricMedian
from corymb.strategies.robust.krum import Krum
from corymb.strategies.robust.median import Median
from corymb.strategies.robust.trimmed_mean import TrimmedMean
from corymb.strategies.voting.plurality import Plurality
from corymb.strategies.voting.run_off import RunOff
from corymb.strategies.voting.run_off_distillation import RunOffDistillation
from corymb.strategies.weighting.fedda import FedDA
from corymb.strategies.weighting.fedgp import FedGP
from corymb.strategies.weighting.fedlaw import FedLAW
from corymb.strategies.weighting.ida import IDA

# By the trouble of who uses them; each group is a folder.
RULES: dict[str, type[Rule[Any]]] = {
    # participation/: sites take part unevenly
    "fedavg": FedAvg,
    "fedau": FedAU,
    "known_participation": KnownParticipation,
    "mifa": MIFA,
    "fedvarp": FedVARP,
    # weighting/: sites are of unequal worth
    "ida": IDA,
    "fedlaw": FedLAW,
    "fedda": FedDA,
    "fedgp": FedGP,
    # robust/: sites may be hostile
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "bulyan": Bulyan,
    "norm_clipping": NormClipping,
    "centred_clipping": CentredClipping,
    "fltrust": FLTrust,
    "foolsgold": FoolsGold,
    # voting/: answers must be certified
    "plurality": Plurality,
    "run_off": RunOff,
    "run_off_distillation": RunOffDistillation,
    # merging/: models are to be merged
    "greedy_soup": GreedySoup,
    "learned_soup": LearnedSoup,
    "model_stock": ModelStock,
    "fisher": FisherMerging,
    "weight_matching": WeightMatching,
    "iso_c": IsoC,
    "iso_cts": IsoCTS,
    "layerwise": Layerwise,
}
_registry = Registry("rule", RULES, "corymb.rules")


def known_rules() -> dict[str, type[Rule[Any]]]:
    """Every rule by name: our own table, then what installed packages add."""
    return {name: _registry.find(name) for name in _registry.names()}


def make_rule(name: str, **parameters: Any) -> Rule[Any]:
    """The rule called `name`, or at the reference "module:name", with `parameters`.

    A parameter that is a rule itself may be given as a name, or as a table with "name" and its parameters. Raises
    `ValueError` for an unknown name or parameter, listing the known ones, and for a value out of range.
    """
    kind = _registry.find(name)
    if not (isinstance(kind, type) and issubclass(kind, Rule)):
        raise ValueError(f"The rule {name!r} is a {type(kind).__name__}; refer to a class of rules.")
    known = [field.name for field in fields(kind)]
    for parameter in parameters:
        if parameter not in known:
            if not known:
                raise ValueError(f"Rule {name!r} has no parameter {parameter!r}; it has none.")
            raise ValueError(unknown(f"parameter of rule {name!r}", parameter, known))
    types = get_type_hints(kind)
    made, wrong = {}, []
    for parameter, value in parameters.items():
        kinds = _rules_in(types[parameter])
        made[parameter] = value = _rule(value) if kinds else value
        if kinds and not isinstance(value, kinds):
            wrong.append(f"{parameter}: {value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
        elif not kinds:
            try:
                TypeAdapter(types[parameter]).validate_python(value, strict=True)
            except ValidationError as error:
                wrong.append(f"{parameter}: {error.errors()[0]['msg']}")
    try:
        if not wrong:
            return kind(**made)
    except (TypeError, ValueError) as error:
        wrong.append(str(error).removesuffix("."))
    raise ValueError(f"Rule {name!r} cannot be made with {parameters}: {'; '.join(wrong)}.")


def _rules_in(kind: Any) -> tuple[type, ...]:
    """The classes of rules that a parameter of the type `kind` may be, and None's where it may; none for others."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    classes = tuple(get_origin(part) or part for part in parts)
    return classes if any(isinstance(part, type) and issubclass(part, Rule) for part in classes) else ()


def _rule(value: Any) -> Any:
    if isinstance(value, str):
        return make_rule(value)
    if isinstance(value, Mapping):
        parameters = dict(value)
        return make_rule(parameters.pop("name", ""), **parameters)
    return value
