"""The server: aggregation rules as Flower strategies, the decision of a round, the journal, and a ready ServerApp."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_PLACES = {
    "Journal": "corymb.server.journal",
    "DynamicBackupWorkers": "corymb.server.rounds.backup_workers",
    "CandidateElection": "corymb.server.rounds.candidate_election",
    "conclude": "corymb.server.rounds.conclude",
    "Policy": "corymb.server.rounds.policy",
    "RoundRecord": "corymb.server.rounds.record",
    "Verdict": "corymb.server.rounds.record",
    "Requests": "corymb.server.rounds.round",
    "Round": "corymb.server.rounds.round",
    "RoundSize": "corymb.server.rounds.round_size",
    "WaitForShare": "corymb.server.rounds.round_size",
    "NoReplyAdmitted": "corymb.server.rounds.run_failed",
    "QuorumMissed": "corymb.server.rounds.run_failed",
    "RunFailed": "corymb.server.rounds.run_failed",
    "Method": "corymb.server.rounds.state",
    "RunState": "corymb.server.rounds.state",
    "FlowerStrategy": "corymb.server.strategy",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the programs of a deployment need no torch, which takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
