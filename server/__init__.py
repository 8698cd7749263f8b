"""What runs a federation: a rule as a Flower strategy, the door, the journal, a ready ServerApp."""

from corymb.server.journal import Journal
from corymb.server.record import RoundRecord, Verdict
from corymb.server.strategy import FlowerStrategy

__all__ = ["FlowerStrategy", "Journal", "RoundRecord", "Verdict"]
