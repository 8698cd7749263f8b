"""Aggregation rules: each turns the replies of one round into the next model. Pure torch: no Flower, no I/O.

`core/` holds the code that all rules share: base classes, models as flat vectors, weighted sums. Each other folder
holds the rules for one problem, one file per rule. `rules.py` maps names to rules. Other packages can add rules
through the entry-point group `corymb.rules`.
"""

from corymb.strategies.core.blind import BlindRule
from corymb.strategies.core.cohort import Cohort
from corymb.strategies.core.layout import Layout, Model
from corymb.strategies.core.proxy import Proxy
from corymb.strategies.core.reply import Reply, Report
from corymb.strategies.core.rule import Outcome, Rule
from corymb.strategies.core.server_optimizer import ServerOptimizer
from corymb.strategies.core.sighted import Mix, SightedRule
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
from corymb.strategies.rules import RULES, known_rules, make_rule
from corymb.strategies.voting.election import Election
from corymb.strategies.voting.plurality import Plurality
from corymb.strategies.voting.run_off import RunOff
from corymb.strategies.voting.run_off_distillation import RunOffDistillation
from corymb.strategies.voting.voting_rule import Voters, VotingRule
from corymb.strategies.weighting.fedda import FedDA
from corymb.strategies.weighting.fedgp import FedGP
from corymb.strategies.weighting.fedlaw import FedLAW
from corymb.strategies.weighting.ida import IDA

__all__ = [
    "IDA",
    "MIFA",
    "RULES",
    "BlindRule",
    "Bulyan",
    "CentredClipping",
    "Cohort",
    "Election",
    "FLTrust",
    "FedAU",
    "FedAvg",
    "FedDA",
    "FedDyn",
    "FedGP",
    "FedLAW",
    "FedNova",
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
    "Mix",
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
    "Scaffold",
    "ServerOptimizer",
    "SightedRule",
    "TrimmedMean",
    "Voters",
    "VotingRule",
    "WeightMatching",
    "known_rules",
    "make_rule",
]
