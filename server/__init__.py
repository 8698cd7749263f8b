"""What runs a federation: a rule as a Flower strategy, the door, the journal, a ready ServerApp."""

from corymb.server.guard import Guard
from corymb.server.journal import Journal
from corymb.server.patience import DynamicBackupWorkers, Patience, WaitForShare
from corymb.server.record import RoundRecord, Verdict
from corymb.server.strategy import FlowerStrategy

__all__ = [
    "DynamicBackupWorkers",
    "FlowerStrategy",
    "Guard",
    "Journal",
    "Patience",
    "RoundRecord",
    "Verdict",
    "WaitForShare",
]
