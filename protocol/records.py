"""Names of the records and metrics in messages. They are the same as in Flower's built-in strategies."""

from __future__ import annotations

from typing import Final, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

ARRAYS: Final = "arrays"  # ArrayRecord: the model's state dict
CONFIG: Final = "config"  # ConfigRecord: server -> client
METRICS: Final = "metrics"  # MetricRecord: client -> server
STEPS: Final = "steps"  # ArrayRecord from a target client: each batch's update, [S, ...]; metric: number of batches

EXAMPLES: Final = "num-examples"  # metric: number of examples that the client trained or evaluated on
ROUND: Final = "server-round"  # config: round number, from 1


def of_kind(content: RecordDict, kind: type[R]) -> list[R]:
    """Return all records of the type `kind` in a message.

    Use this instead of Flower's `content.array_records`. That property creates a reference cycle, which keeps the
    whole model in memory until Python's garbage collector runs: 26 models in a round of 50 replies.
    """
    return [record for record in content.values() if isinstance(record, kind)]
