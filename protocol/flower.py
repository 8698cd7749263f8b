"""The one place that touches what Flower keeps private. Tested against each flwr version that we support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from flwr.app import ArrayRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)
CLIENT_APP_RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


class Node(Protocol):
    """What we read of Flower's NodeInfo: an id that changes with every run, and the operator's name ("" for none)."""

    node_id: int
    name: str


def node_info(node_id: int, name: str) -> Node:
    """A node as `Grid.get_nodes` returns it."""
    return cast(Node, NodeInfo(node_id=node_id, name=name, status="online"))


def empty_run(run_id: int) -> Run:
    """A run with nothing filled in but its id, as `Grid.run` returns it."""
    return Run.create_empty(run_id)


def inside_task(run_id: int, node_id: int) -> None:
    """Let this process construct messages, which Flower allows only inside a running task."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def stamp(message: Message, message_id: str) -> None:
    """Give `message` its id, as a grid does when it is pushed."""
    message.metadata.__dict__["_message_id"] = message_id


def quick_metrics(numbers: dict[str, int | float]) -> MetricRecord:
    """A MetricRecord of numbers that are known to be numbers: checking each costs more than a small model's step."""
    record = MetricRecord()
    record.__dict__["_data"] = numbers
    return record


def quick_record(records: Mapping[str, ArrayRecord | MetricRecord]) -> RecordDict:
    """A RecordDict of records that are known to be records."""
    content = RecordDict()
    content.__dict__["_data"] = dict(records)
    return content


def quick_messages(content: RecordDict, node_ids: list[int], kind: str, group_id: str) -> list[Message]:
    """`Message(content, node_id, kind, group_id=group_id)` for each of `node_ids`, checked once."""
    if not node_ids:
        return []
    first = Message(content, node_ids[0], kind, group_id=group_id)
    messages = []
    for node_id in node_ids:
        metadata = Metadata.__new__(Metadata)
        metadata.__dict__.update(first.metadata.__dict__, _dst_node_id=node_id)
        message = Message.__new__(Message)
        message.__dict__.update(_metadata=metadata, _content=content, _error=None)
        messages.append(message)
    return messages


def quick_reply(message: Message, content: RecordDict | None = None, error: Error | None = None) -> Message:
    """`Message(content or error, reply_to=message)` for a reply within this process: as fresh as its message."""
    asked = message.metadata.__dict__
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(
        asked,
        _message_id=f"reply-{asked['_message_id']}",
        _src_node_id=asked["_dst_node_id"],
        _dst_node_id=asked["_src_node_id"],
        _src_task_id=asked["_dst_task_id"],
        _dst_task_id=asked["_src_task_id"],
        _reply_to_message_id=asked["_message_id"],
    )
    reply = Message.__new__(Message)
    reply.__dict__.update(_metadata=metadata, _content=content, _error=error)
    return reply
