from __future__ import annotations

from importlib.metadata import version

from flwr.app import Message, RecordDict

from corymb.protocol.flower import (
    CLIENT_APP_RAISED,
    NODE_UNAVAILABLE,
    empty_run,
    inside_task,
    node_info,
    stamp,
)


def test_flowers_private_api_is_as_expected() -> None:
    assert version("flwr").startswith("1.41."), "before allowing another flwr version, run this test against it"
    inside_task(run_id=7, node_id=1)
    message = Message(RecordDict(), 42, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 1)
    stamp(message, "m-1")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m-1"
    assert empty_run(7).run_id == 7
    node = node_info(42, "site")
    assert (node.node_id, node.name) == (42, "site")
    assert (CLIENT_APP_RAISED, NODE_UNAVAILABLE) == (2, 5)
