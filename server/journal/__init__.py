"""The one record of a run: rounds, verdicts and models. Going on, tables and pictures read it."""

from corymb.server.journal.journal import Journal
from corymb.server.journal.rows import committed

__all__ = ["Journal", "committed"]
