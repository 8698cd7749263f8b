"""A Flower mod with which a client answers a request that is repeated from memory, without training again.

The answer lies in a file: Flower keeps a client's Context in the SuperNode's memory, and cuts off the transfer of a
large one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message

from corymb.protocol.home import home
from corymb.protocol.message_file import read_message, write_message
from corymb.protocol.records import NONCE, of_kind

FOLDER = "answers"  # in `home()`
MARK = "answered"  # the record of a reply with the nonce that it answers: the server sees that the client remembers
OLD_SECONDS = 7 * 24 * 3600.0  # after which an answer is deleted


def answer_from_memory(message: Message, context: Context, app: Callable[[Message, Context], Message]) -> Message:
    """Return the reply of `app` to `message`. A request with the nonce of the last one gets the same reply again.

    For `ClientApp(mods=[answer_from_memory])`. The last reply to a training message and to an evaluation message is
    kept in `~/.corymb/answers` (or `$CORYMB_HOME/answers`), readable for this user only, for a week at most. Requests
    without a nonce, as in simulations, pass unchanged.
    """
    nonce = next((record[NONCE] for record in of_kind(message.content, ConfigRecord) if NONCE in record), None)
    if nonce is None:
        return app(message, context)
    kind = message.metadata.message_type.partition(".")[0]
    name = hashlib.sha256(f"{context.run_id}/{context.node_id}/{kind}".encode()).hexdigest()
    path = home() / FOLDER / name
    kept = _kept(path)
    if kept is not None and any(record.get(NONCE) == nonce for record in of_kind(kept.content, ConfigRecord)):
        return Message(kept.content, reply_to=message)
    reply = app(message, context)
    if reply.has_error():
        return reply
    reply.content[MARK] = ConfigRecord({NONCE: nonce})
    try:
        _keep(path, reply)
    except OSError:
        del reply.content[MARK]  # the server must not ask this client again
    return reply


def _kept(path: Path) -> Message | None:
    try:
        return read_message(path)
    except OSError:
        return None


def _keep(path: Path, reply: Message) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_message(path, reply)
    for other in path.parent.iterdir():
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > OLD_SECONDS:
                other.unlink()
