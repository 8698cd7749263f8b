"""The server: aggregation rules as Flower strategies, the decision of a round, the journal, and a ready ServerApp."""

from corymb.server.journal import Journal
from corymb.server.rounds.backup_workers import DynamicBackupWorkers
from corymb.server.rounds.candidate_election import CandidateElection
from corymb.server.rounds.conclude import conclude
from corymb.server.rounds.policy import Policy
from corymb.server.rounds.record import RoundRecord, Verdict
from corymb.server.rounds.round import Requests, Round
from corymb.server.rounds.round_size import RoundSize, WaitForShare
from corymb.server.rounds.run_failed import NoReplyAdmitted, QuorumMissed, RunFailed
from corymb.server.rounds.state import Method, RunState
from corymb.server.strategy import FlowerStrategy

__all__ = [
    "CandidateElection",
    "DynamicBackupWorkers",
    "FlowerStrategy",
    "Journal",
    "Method",
    "NoReplyAdmitted",
    "Policy",
    "QuorumMissed",
    "Requests",
    "Round",
    "RoundRecord",
    "RoundSize",
    "RunFailed",
    "RunState",
    "Verdict",
    "WaitForShare",
    "conclude",
]
