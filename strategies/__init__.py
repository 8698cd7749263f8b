"""Rules: what one round's replies become. Pure mathematics on torch; no Flower, no I/O.

`RULES` is the one table of names; other packages add theirs in the entry-point group `corymb.rules`.
"""

from __future__ import annotations

from typing import Any

from corymb.strategies.blind import BlindRule
from corymb.strategies.bulyan import Bulyan
from corymb.strategies.clipping import CentredClipping, NormClipping
from corymb.strategies.cohort import Cohort
from corymb.strategies.distillation import RunOffDistillation
from corymb.strategies.electing import ElectingRule, Electorate
from corymb.strategies.election import Election
from corymb.strategies.fedau import FedAU
from corymb.strategies.fedavg import FedAvg
from corymb.strategies.fedda import FedDA
from corymb.strategies.fedgp import FedGP
from corymb.strategies.fedlaw import FedLAW
from corymb.strategies.fedvarp import FedVARP
from corymb.strategies.fisher import FisherMerging
from corymb.strategies.fltrust import FLTrust
from corymb.strategies.foolsgold import FoolsGold
from corymb.strategies.geometric_median import GeometricMedian
from corymb.strategies.greedy_soup import GreedySoup
from corymb.strategies.ida import IDA
from corymb.strategies.isotropic import IsoC, IsoCTS
from corymb.strategies.known_participation import KnownParticipation
from corymb.strategies.krum import Krum
from corymb.strategies.layerwise import Layerwise
from corymb.strategies.layout import Layout, Model
from corymb.strategies.learned_soup import LearnedSoup
from corymb.strategies.making import known_rules, make_rule
from corymb.strategies.median import Median
from corymb.strategies.mifa import MIFA
from corymb.strategies.model_stock import ModelStock
from corymb.strategies.plurality import Plurality
from corymb.strategies.proxy import Proxy
from corymb.strategies.reply import Reply, Report
from corymb.strategies.rule import Outcome, Rule
from corymb.strategies.run_off import RunOff
from corymb.strategies.sighted import SightedRule
from corymb.strategies.step import Step
from corymb.strategies.trimmed_mean import TrimmedMean
from corymb.strategies.weight_matching import WeightMatching

RULES: dict[str, type[Rule[Any]]] = {
    # uneven participation
    "fedavg": FedAvg,
    "fedau": FedAU,
    "known_participation": KnownParticipation,
    "mifa": MIFA,
    "fedvarp": FedVARP,
    # sites of unlike worth
    "ida": IDA,
    "fedlaw": FedLAW,
    "fedda": FedDA,
    "fedgp": FedGP,
    # hostile sites
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "bulyan": Bulyan,
    "norm_clipping": NormClipping,
    "centred_clipping": CentredClipping,
    "fltrust": FLTrust,
    "foolsgold": FoolsGold,
    # elections
    "plurality": Plurality,
    "run_off": RunOff,
    "run_off_distillation": RunOffDistillation,
    # merging
    "greedy_soup": GreedySoup,
    "learned_soup": LearnedSoup,
    "model_stock": ModelStock,
    "fisher": FisherMerging,
    "weight_matching": WeightMatching,
    "iso_c": IsoC,
    "iso_cts": IsoCTS,
    "layerwise": Layerwise,
}

__all__ = [
    "IDA",
    "MIFA",
    "RULES",
    "BlindRule",
    "Bulyan",
    "CentredClipping",
    "Cohort",
    "ElectingRule",
    "Election",
    "Electorate",
    "FLTrust",
    "FedAU",
    "FedAvg",
    "FedDA",
    "FedGP",
    "FedLAW",
    "FedVARP",
    "FisherMerging",
    "FoolsGold",
    "GeometricMedian",
    "GreedySoup",
    "IsoC",
    "IsoCTS",
    "KnownParticipation",
    "Krum",
    "Layerwise",
    "Layout",
    "LearnedSoup",
    "Median",
    "Model",
    "ModelStock",
    "NormClipping",
    "Outcome",
    "Plurality",
    "Proxy",
    "Reply",
    "Report",
    "Rule",
    "RunOff",
    "RunOffDistillation",
    "SightedRule",
    "Step",
    "TrimmedMean",
    "WeightMatching",
    "known_rules",
    "make_rule",
]
