"""What pages read of a journal: rounds, verdicts, events, the phase under way, and totals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundRow:
    """A finished round: its number, its duration, and the metrics of the clients' training, their tests and ours."""

    round: int
    seconds: float
    train: dict[str, float]
    evaluate: dict[str, float]
    server: dict[str, float]
    notes: dict[str, float]

    @property
    def measured(self) -> dict[str, float]:
        """The metrics of the test: the server's own, else the clients'."""
        return self.server or self.evaluate


@dataclass(frozen=True)
class VerdictRow:
    """The verdict on a client's reply in a round."""

    round: int
    node: str
    code: str
    reason: str
    examples: float
    weight: float | None
    metrics: dict[str, float]
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class EventRow:
    """An event; `id` grows with time."""

    id: int
    at: float
    round: int
    phase: str
    node: str
    what: str
    seconds: float | None
    size: int
    detail: str


@dataclass(frozen=True)
class Ask:
    """What was asked in the phase under way: at the Unix time `at`, and who has not answered."""

    round: int
    phase: str
    at: float
    asked: tuple[str, ...]
    waiting: tuple[str, ...]


@dataclass
class Totals:
    """What a run has cost up to round `last`: replies by verdict, and bytes each way."""

    last: int = 0
    verdicts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes_down: int = 0
    bytes_up: int = 0
