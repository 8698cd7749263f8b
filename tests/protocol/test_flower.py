from __future__ import annotations

from importlib.metadata import version

from flwr.app import Message, RecordDict

from corymb.protocol.flower import (
    CLIENT_APP_RAISED,
    NODE_UNAVAILABLE,
    empty_run,
    node_info,
    set_message_id,
    set_task_identity,
)


def test_flowers_private_api_is_as_expected() -> None:
    assert version("flwr").startswith(("1.41.", "1.42.")), "before allowing another version, run this test with it"
    set_task_identity(run_id=7, node_id=1)
    message = Message(RecordDict(), 42, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 1)
    set_message_id(message, "m-1")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m-1"
    assert empty_run(7).run_id == 7
    node = node_info(42, "site")
    assert (node.node_id, node.name) == (42, "site")
    assert (CLIENT_APP_RAISED, NODE_UNAVAILABLE) == (2, 5)
