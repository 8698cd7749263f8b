"""What a client has seen of its batches when it stops, at the end or at the deadline."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from flwr.app import ConfigRecord, Message

from corymb.client.batches import Batch, Examples, count, size
from corymb.protocol.records import DEADLINE, of_kind
from corymb.protocol.train_settings import TrainSettings

TRAINING_SHARE = 0.8  # of the time until the deadline; the rest is for the upload


@dataclass
class Seen:
    """Batches until `seconds` have passed, but at least one; and the number of batches and examples that were read."""

    batches: Iterable[Batch]
    seconds: float = inf
    number: int = 0
    examples: int = 0
    was_cut: bool = False

    def __iter__(self) -> Iterator[Batch]:
        ends = time.monotonic() + self.seconds
        for batch in self.batches:
            if self.number and time.monotonic() > ends:
                self.was_cut = True
                return
            self.number += 1
            self.examples += size(batch)
            yield batch


def seconds_left(message: Message) -> float:
    """Return for how many seconds a client may train: until `TRAINING_SHARE` of the time to the deadline has passed."""
    deadlines = [record[DEADLINE] for record in of_kind(message.content, ConfigRecord) if DEADLINE in record]
    if not deadlines or not isinstance(deadlines[0], (int, float)):
        return inf
    return TRAINING_SHARE * deadlines[0] - max(0.0, time.time() - message.metadata.created_at)


def completed_share(examples: Examples, seen: Seen, settings: TrainSettings) -> dict[str, float]:
    """Return how much of its training a client has done, from 0 to 1, as the metric `completed`; nothing if unknown."""
    known = count(examples)
    if settings.steps is not None:
        return {"completed": seen.number / settings.steps}
    return {"completed": seen.examples / (known * (settings.epochs or 1))} if known else {}


def used_examples(examples: Examples, seen: Seen, settings: TrainSettings) -> int:
    """Return the number of examples that the reply counts with: all of the client's own, however many its steps need.

    If the training was cut, the share of them that it has done counts, or with epochs those that it has seen. Without
    a known number, those that it trained on count, each once.
    """
    known = count(examples)
    if known is not None:
        if not seen.was_cut:
            return known
        if settings.steps is not None:
            return max(1, round(known * seen.number / settings.steps))
        return min(known, seen.examples)
    return seen.examples if settings.steps is not None else seen.examples // (settings.epochs or 1)
