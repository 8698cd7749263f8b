"""Small real things that tests are built from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from corymb.protocol.codec import to_arrays
from corymb.protocol.flower import inside_task, stamp
from corymb.strategies import Model, Reply, Rule

GOLDEN = Path(__file__).parent / "golden"
State = Mapping[str, Tensor]


def golden(name: str) -> Any:
    """A file of worked values."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def vector(*numbers: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(numbers, dtype=torch.float64)


def after(rule: Rule[Any], origin: Tensor, replies: list[Reply], memory: Any = None, known: Any = ()) -> Tensor:
    """The parameters after one round."""
    outcome = rule.aggregate(Model(origin), replies, rule.initial() if memory is None else memory, known)
    return outcome.model.parameters


def content(state: State, examples: Any = 1, **metrics: float) -> RecordDict:
    """What a site sends back after training."""
    record = MetricRecord({"num-examples": examples, **metrics})
    return RecordDict({"arrays": to_arrays(state), "metrics": record})


def reply(node_id: int, what: RecordDict) -> Message:
    """A reply from `node_id` to a message that was really made."""
    inside_task(run_id=1, node_id=1)
    asked = Message(RecordDict(), node_id, "train")
    stamp(asked, f"asked-{node_id}")
    return Message(what, reply_to=asked)
