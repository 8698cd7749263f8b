"""The journal: the on-disk record of a run, with its rounds, verdicts and models. Tables and plots read it."""

from corymb.server.journal.journal import Journal
from corymb.server.journal.rows import committed

__all__ = ["Journal", "committed"]
