"""Names of the records and metrics in messages, the same as in Flower's built-in strategies, and copies of messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

ARRAYS: Final = "arrays"  # ArrayRecord: the model's state dict
CONFIG: Final = "config"  # ConfigRecord: server -> client
METRICS: Final = "metrics"  # MetricRecord: client -> server
EXTRA: Final = "extra"  # ArrayRecord: server -> client, a rule's second vector by parameter name
STEPS: Final = "steps"  # ArrayRecord from a target client: each batch's update, [S, ...]; metric: number of batches

EXAMPLES: Final = "num-examples"  # metric: number of examples that the client trained or evaluated on
ROUND: Final = "server-round"  # config: round number, from 1
EMPTY_ROUND: Final = "query.corymb_empty_round"  # type of a message that the gate of a site answers, without any app
NONCE: Final = "nonce"  # config: identifies what is asked; the same if a node is asked again. A reply may repeat it
MEMORY: Final = "memory-run"  # config: the first Flower run of a resumed run; clients keep things under its id
RESUMABLE: Final = "resumable-rounds"  # config: the rounds after which the run can be resumed
DEADLINE: Final = "deadline"  # config: seconds from the creation of the message until the server stops waiting


def memory_run(content: RecordDict, run_id: int) -> int:
    """Return the id of the Flower run under which a client keeps things: that which the message names, or `run_id`.

    Raises `ValueError` if the message names something that is no number.
    """
    named = [int(str(record[MEMORY])) for record in of_kind(content, ConfigRecord) if MEMORY in record]
    return named[0] if named else run_id


def resumable_rounds(configs: Iterable[ConfigRecord]) -> tuple[int, ...]:
    """Return the rounds after which the run may be resumed. Raises `ValueError` if they are not a list of numbers."""
    named = next((config[RESUMABLE] for config in configs if RESUMABLE in config), [])
    if not isinstance(named, list):
        raise ValueError(f"The message's {RESUMABLE} is {named!r}; it must be a list of round numbers.")
    return tuple(int(number) for number in named)


def of_kind(content: RecordDict, kind: type[R]) -> list[R]:
    """Return all records of the type `kind` in a message.

    Use this instead of Flower's `content.array_records`. That property creates a reference cycle, which keeps the
    whole model in memory until Python's garbage collector runs: 26 models in a round of 50 replies.
    """
    return [record for record in content.values() if isinstance(record, kind)]


def copied_message(message: Message) -> Message:
    """Return `message` with its own records: messages may share one content, and an app may change its records."""
    content = copied_records(message.content)
    copied: Message = Message(content=content, metadata=message.metadata)  # type: ignore[call-overload]  # as grids do
    return copied


def copied_records(records: RecordDict) -> RecordDict:
    """Return a copy of `records`, with a copy of each record and of the lists in it. Arrays are shared."""
    copies: dict[str, Any] = {name: record.copy() for name, record in records.items()}
    for record in copies.values():
        if not isinstance(record, ArrayRecord):
            record.update({key: value.copy() for key, value in record.items() if isinstance(value, list)})
    return RecordDict(copies)
