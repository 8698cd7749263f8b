"""The names that server and sites use in their messages; the same as Flower's built-in strategies."""

from __future__ import annotations

from typing import Final, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

ARRAYS: Final = "arrays"  # ArrayRecord: the model's state dict
CONFIG: Final = "config"  # ConfigRecord: server -> site
METRICS: Final = "metrics"  # MetricRecord: site -> server
STEPS: Final = "steps"  # ArrayRecord: the update of each batch [S, ...], of a target site; metric: how many batches

EXAMPLES: Final = "num-examples"  # metric: how many examples the site trained or evaluated on
ROUND: Final = "server-round"  # config: the round, from 1


def of_kind(content: RecordDict, kind: type[R]) -> list[R]:
    """The records of one kind in a message.

    Flower's `content.array_records` makes a cycle that keeps the whole model in memory until Python
    collects its garbage: 26 models in a round of 50 replies.
    """
    return [record for record in content.values() if isinstance(record, kind)]
