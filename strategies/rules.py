"""The table of all aggregation rules, and `make_rule`, which builds a rule from its name and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from corymb.strategies.core.registry import Registry, unknown
from corymb.strategies.core.rule import Rule
from corymb.strategies.drift.feddyn import FedDyn
from corymb.strategies.drift.fednova import FedNova
from corymb.strategies.drift.scaffold import Scaffold
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

# Grouped by the problem that the rules solve; each group is a folder.
RULES: dict[str, type[Rule[Any]]] = {
    # participation/: clients take part unevenly
    "fedavg": FedAvg,
    "fedau": FedAU,
    "known_participation": KnownParticipation,
    "mifa": MIFA,
    "fedvarp": FedVARP,
    # drift/: clients drift apart in their local steps
    "scaffold": Scaffold,
    "feddyn": FedDyn,
    "fednova": FedNova,
    # weighting/: clients' data differ in quality or relevance
    "ida": IDA,
    "fedlaw": FedLAW,
    "fedda": FedDA,
    "fedgp": FedGP,
    # robust/: clients may be hostile
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "bulyan": Bulyan,
    "norm_clipping": NormClipping,
    "centred_clipping": CentredClipping,
    "fltrust": FLTrust,
    "foolsgold": FoolsGold,
    # voting/: predictions need a certificate
    "plurality": Plurality,
    "run_off": RunOff,
    "run_off_distillation": RunOffDistillation,
    # merging/: models are merged, as in model soups
    "greedy_soup": GreedySoup,
    "learned_soup": LearnedSoup,
    "model_stock": ModelStock,
    "fisher": FisherMerging,
    "weight_matching": WeightMatching,
    "iso_c": IsoC,
    "iso_cts": IsoCTS,
    "layerwise": Layerwise,
}
"""The built-in rules by name."""
HINTS = {  # methods that are a rule with something around it
    "fedprox": "use 'fedavg' and set train.proximal, the method's mu",
    "fedadam": "use 'fedavg' with server_optimizer = { optimizer = \"Adam\" }",
    "fedyogi": "use 'fedavg' with server_optimizer = { optimizer = \"Yogi\" }",
    "fedadagrad": "use 'fedavg' with server_optimizer = { optimizer = \"Adagrad\" }",
    "fedavgm": "use 'fedavg' with server_optimizer = { optimizer = \"SGD\", options = { momentum = 0.9 } }",
}
_registry = Registry("rule", RULES, "corymb.rules")


def known_rules() -> dict[str, type[Rule[Any]]]:
    """Return every rule class by name: the built-in ones, then those of installed packages."""
    return {name: _registry.find(name) for name in _registry.names()}


def rule_class(name: str) -> type[Rule[Any]]:
    """Return the class of the rule called `name`, or the one at the reference "module:name".

    Raises `ValueError` for an unknown name; the message lists the known ones.
    """
    if name in HINTS and name not in _registry.names():
        raise ValueError(f"{name!r} is no rule of its own; {HINTS[name]}.")
    found = _registry.find(name)
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ValueError(f"Rule {name!r} refers to a {type(found).__name__}; refer to a subclass of Rule.")
    return found


def make_rule(name: str, **parameters: Any) -> Rule[Any]:
    """Return the rule called `name`, or the one at the reference "module:name", built with `parameters`.

    A parameter whose type is a rule may be given as the name of a rule, or as a table with the key "name" and the
    parameters of that rule. Raises `ValueError` for an unknown name or parameter (the message lists the known ones)
    and for an invalid value.
    """
    chosen = rule_class(name)
    known = [field.name for field in fields(chosen)]
    for parameter in parameters:
        if parameter not in known:
            if not known:
                raise ValueError(f"Rule {name!r} has no parameter {parameter!r}; it takes no parameters.")
            raise ValueError(unknown(f"Rule {name!r} has no parameter", parameter, known))
    if missing := [f.name for f in fields(chosen) if _is_required(f) and f.name not in parameters]:
        raise ValueError(f"Rule {name!r} needs the parameter {missing[0]!r}; set it in `parameters`.")
    types = get_type_hints(chosen)
    values, problems = {}, []
    for parameter, value in parameters.items():
        accepted = _accepted_rule_classes(types[parameter])
        values[parameter] = value = _rule_from_setting(value) if accepted else value
        if accepted and not isinstance(value, accepted):
            problems.append(f"{parameter}: {value!r} is not a {' or '.join(option.__name__ for option in accepted)}")
        elif not accepted:
            try:
                TypeAdapter(types[parameter]).validate_python(value, strict=True)
            except ValidationError as error:
                problems.append(f"{parameter}: {error.errors()[0]['msg']}")
    try:
        if not problems:
            return chosen(**values)
    except (TypeError, ValueError) as error:
        problems.append(str(error).removesuffix("."))
    raise ValueError(f"Rule {name!r} cannot be built with {parameters}: {'; '.join(problems)}.")


def _is_required(field: Field[Any]) -> bool:
    return field.init and field.default is MISSING and field.default_factory is MISSING


def _accepted_rule_classes(annotation: Any) -> tuple[type, ...]:
    """Return the classes (NoneType included) in `annotation` if one of them is a rule; otherwise an empty tuple."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    classes = tuple(get_origin(part) or part for part in parts)
    return classes if any(isinstance(part, type) and issubclass(part, Rule) for part in classes) else ()


def _rule_from_setting(value: Any) -> Any:
    if isinstance(value, str):
        return make_rule(value)
    if isinstance(value, Mapping):
        parameters = dict(value)
        return make_rule(parameters.pop("name", ""), **parameters)
    return value
