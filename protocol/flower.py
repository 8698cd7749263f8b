"""The only module that uses Flower's private API. Its test runs against each supported version of flwr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, cast

from flwr.app import Array, ArrayRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)
MESSAGE_LOST = frozenset({int(ErrorCode.MESSAGE_UNAVAILABLE), int(ErrorCode.REPLY_MESSAGE_UNAVAILABLE)})
CLIENT_APP_RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


class Node(Protocol):
    """The fields of Flower's NodeInfo that Corymb reads.

    `node_id` changes with every run. `name` is the name that the operator gave to the node, "" if there is none.
    """

    node_id: int
    name: str


def node_info(node_id: int, name: str) -> Node:
    """Return a node in the form that `Grid.get_nodes` returns."""
    return cast(Node, NodeInfo(node_id=node_id, name=name, status="online"))


def empty_run(run_id: int) -> Run:
    """Return a run, in the form that `Grid.run` returns, with only its id set."""
    return Run.create_empty(run_id)


def set_task_identity(run_id: int, node_id: int) -> None:
    """Set the task of this process, because Flower allows the creation of messages only inside a running task."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def set_message_id(message: Message, message_id: str) -> None:
    """Set the id of `message`, as a grid does when the message is pushed."""
    message.metadata.__dict__["_message_id"] = message_id


def set_reply_to(reply: Message, message_id: str) -> None:
    """Set the id of the message to which `reply` is the reply."""
    reply.metadata.__dict__["_reply_to_message_id"] = message_id


def set_message_ids(messages: Iterable[Message]) -> None:
    """Set the ids of `messages` to those that Flower's grid for deployments gives them when they are pushed."""
    with no_object_id_recompute():
        for message in messages:
            set_message_id(message, message.object_id)


def forget_chunks(message: Message) -> None:
    """Free the copy of the arrays that Flower keeps in a message after pushing it."""
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                array.__dict__.pop("_chunks", None)


def is_simulation(grid: Grid) -> bool:
    """Return whether `grid` is that of Flower's own simulation."""
    return type(grid).__name__ == "InMemoryGrid"  # importing the class would import Flower's database


def to_proto(message: Message) -> bytes:
    """Return `message` in Flower's own encoding, at most 2 GiB."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def from_proto(data: bytes) -> Message:
    """Return the message that `to_proto` has encoded."""
    return message_from_proto(MessageProto.FromString(data))


def with_content(message: Message, content: RecordDict) -> Message:
    """Return a message with the metadata of `message` and other content."""
    other = Message.__new__(Message)
    other.__dict__.update(_metadata=message.metadata, _content=content, _error=None)
    return other


def with_error(message: Message, error: Error) -> Message:
    """Return a message with the metadata of `message`, and `error` in place of its content."""
    other = Message.__new__(Message)
    other.__dict__.update(_metadata=message.metadata, _content=None, _error=error)
    return other


def unchecked_metrics(numbers: dict[str, int | float]) -> MetricRecord:
    """Return `MetricRecord(numbers)` without Flower's type check of each value.

    The check takes longer than a training step of a small model.
    """
    record = MetricRecord()
    record.__dict__["_data"] = numbers
    return record


def unchecked_arrays(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Return `ArrayRecord(arrays)` without Flower's type check of each array."""
    record = ArrayRecord()
    record.__dict__["_data"] = dict(arrays)
    return record


def unchecked_record(records: Mapping[str, ArrayRecord | MetricRecord]) -> RecordDict:
    """Return `RecordDict(records)` without Flower's type check of each record."""
    content = RecordDict()
    content.__dict__["_data"] = dict(records)
    return content


def unchecked_messages(content: RecordDict, node_ids: list[int], kind: str, group_id: str) -> list[Message]:
    """Return `Message(content, node_id, kind, group_id=group_id)` for each of `node_ids`.

    Flower checks the arguments for the first message only.
    """
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


def unchecked_reply(message: Message, content: RecordDict | None = None, error: Error | None = None) -> Message:
    """Return `Message(content or error, reply_to=message)` for a reply within this process.

    Unlike Flower's constructor, it copies the creation time and the TTL from `message`.
    """
    request = message.metadata.__dict__
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(
        request,
        _message_id=f"reply-{request['_message_id']}",
        _src_node_id=request["_dst_node_id"],
        _dst_node_id=request["_src_node_id"],
        _src_task_id=request["_dst_task_id"],
        _dst_task_id=request["_src_task_id"],
        _reply_to_message_id=request["_message_id"],
    )
    reply = Message.__new__(Message)
    reply.__dict__.update(_metadata=metadata, _content=content, _error=error)
    return reply
