"""A Flower mod with which a client answers a request that is repeated from memory, without training again."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict

from corymb.protocol.records import NONCE, of_kind

MARK = "answered"  # the record of a reply with the nonce that it answers
PREFIX = "corymb-answer-"  # of the records in the client's Context


def answer_from_memory(message: Message, context: Context, app: Callable[[Message, Context], Message]) -> Message:
    """Return the reply of `app` to `message`. A request with the nonce of the last one gets the same reply again.

    For `ClientApp(mods=[answer_from_memory])`. The reply to the last training message and that to the last evaluation
    message are kept in the client's Context. Requests without a nonce pass unchanged.
    """
    nonce = next((record[NONCE] for record in of_kind(message.content, ConfigRecord) if NONCE in record), None)
    if nonce is None:
        return app(message, context)
    prefix = f"{PREFIX}{message.metadata.message_type.partition('.')[0]}/"
    kept = {name.removeprefix(prefix): record for name, record in context.state.items() if name.startswith(prefix)}
    mark = kept.get(MARK)
    if isinstance(mark, ConfigRecord) and mark.get(NONCE) == nonce:
        return Message(RecordDict(kept), reply_to=message)
    reply = app(message, context)
    if reply.has_error():
        return reply
    for name in kept:
        del context.state[f"{prefix}{name}"]
    reply.content[MARK] = ConfigRecord({NONCE: nonce})  # tells the server that this client has a memory
    for name, record in reply.content.items():
        context.state[f"{prefix}{name}"] = record
    return reply
