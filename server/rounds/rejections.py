"""Why a reply does not count, in a code for machines and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from flwr.app import Message

from corymb.protocol.flower import NODE_UNAVAILABLE

UNREADABLE = 1000  # the error code of a reply that this server could not receive; Flower's own codes are small


class Code(StrEnum):
    """Why a reply was turned away."""

    OFFLINE = "offline"  # the network answered: the node cannot be reached
    ERROR = "error"  # the site answered with an error
    RECORDS = "records"  # not one record of arrays and one of metrics
    EXAMPLES = "examples"  # the number of examples is no number of examples
    NAMES = "names"  # a tensor is missing or too many
    SHAPE = "shape"
    DTYPE = "dtype"
    BYTES = "bytes"  # the bytes are not what the header says
    NOT_FINITE = "not finite"  # or too large to be a trained number


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count, and why, in one sentence that names the node."""

    node: str
    code: Code
    reason: str


class Refused(Exception):
    """Raised inside the door; the reason begins with a small letter and lacks the node."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def of_error(node: str, message: Message) -> Rejection:
    """The rejection of a reply that is an error."""
    code, reason = message.error.code, str(message.error.reason)
    if code == NODE_UNAVAILABLE:
        return _offline(node, reason[:1000])
    if code == UNREADABLE:
        return Rejection(node, Code.BYTES, f"{node}: its reply cannot be received: {short(reason)}.")
    return Rejection(node, Code.ERROR, f"{node}: error {code}: {short(reason)}.")


@lru_cache(maxsize=1 << 14)  # the same nodes are offline round after round
def _offline(node: str, reason: str) -> Rejection:
    return Rejection(node, Code.OFFLINE, f"{node}: error {NODE_UNAVAILABLE}: {short(reason)}.")


def of_exception(node: str, error: Exception) -> Rejection:
    """The rejection of a reply that the door could not read to its end."""
    if isinstance(error, Refused):
        return Rejection(node, error.code, f"{node}: {error}.")
    # Whatever else its content makes us stumble over is the sender's fault, and costs its reply only.
    problem = f"{type(error).__name__}: {short(error)}"
    return Rejection(node, Code.RECORDS, f"{node}: its content cannot be read: {problem}.")


def short(value: object) -> str:
    """What a site sent, fit for a log: printable, one line, bounded."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 and text.isprintable() else ascii(text[:200])
