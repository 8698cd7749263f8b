"""The exceptions that end a run which has achieved nothing, or can no longer."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from corymb.server.rounds.codes import BELOW_QUORUM, KEPT_MODEL
from corymb.server.rounds.record import RoundRecord
from corymb.server.rounds.rejections import Code
from corymb.server.rounds.round_journal import UNWRITABLE, RoundJournal

FAILED = "failed"  # in the notes of a journal: why the run has failed


class RunFailed(RuntimeError):
    """A run has failed, and starting its server again would not help."""


class NoReplyAdmitted(RunFailed):
    """A run has ended in which no reply to a training message was admitted in a round that could use it."""

    def __init__(self, rounds: int, last: RoundRecord) -> None:
        kept = [why for note, why in KEPT_MODEL.items() if note in last.notes]
        kept += [f"fewer than the quorum of {last.notes[BELOW_QUORUM]:g}"] if BELOW_QUORUM in last.notes else []
        because = f" ({kept[0]})" if kept else ""
        super().__init__(
            f"No reply has counted in {rounds} round{'s' * (rounds > 1)}, so the model did not change. The last round: "
            f"{_reasons(last, because)}"
        )


class QuorumMissed(RunFailed):
    """A run has ended because too many rounds in a row had fewer admitted replies than the quorum."""

    def __init__(self, rounds: int, last: RoundRecord) -> None:
        in_a_row = f"{rounds} rounds in a row" if rounds > 1 else "A round"
        super().__init__(
            f"{in_a_row} had fewer admitted replies than the quorum of {last.notes[BELOW_QUORUM]:g}, so "
            f"the run ends after round {last.round}, with the model of the last round that counted. The last round: "
            f"{_reasons(last)}"
        )


def noted(error: RunFailed, journal: RoundJournal | None) -> RunFailed:
    """Return `error`, which pages show from now on, because the journal has it."""
    if journal is not None:
        with suppress(*UNWRITABLE):  # as on a full disk; the error itself counts
            journal.note({FAILED: str(error)})
    return error


def _reasons(record: RoundRecord, because: str = "") -> str:
    """Return how many nodes got which verdict in a round, `because`, and one reason in full."""
    counts = Counter(verdict.code for verdict in record.verdicts).most_common()
    told = [v.reason.removesuffix(".") for v in record.verdicts if v.reason and v.code != Code.OFFLINE]
    example = f" For example: {told[0]}." if told else ""
    return (", ".join(f"{count} {code}" for code, count in counts) or "no node was asked") + f"{because}.{example}"
