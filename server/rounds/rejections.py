"""Rejections of replies: each has a code for programs and a sentence for operators."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from flwr.app import Message

from corymb.protocol.flower import NODE_UNAVAILABLE
from corymb.protocol.signatures import FORGED

UNREADABLE = 1000  # the error code of a reply that the server could not receive


class Code(StrEnum):
    """The codes of the reasons for a rejection."""

    OFFLINE = "offline"  # the SuperLink reports that the node is unavailable
    ERROR = "error"  # the client replied with an error
    RECORDS = "records"  # not exactly one ArrayRecord and one MetricRecord, or the content is unreadable
    EXAMPLES = "examples"  # the metric with the number of examples is not a whole number in its range
    METRICS = "metrics"  # a metric that the rule needs is missing
    NAMES = "names"  # a tensor is missing, or is not in the model
    SHAPE = "shape"
    DTYPE = "dtype"
    BYTES = "bytes"  # the bytes do not match the header
    NORM = "norm"  # the update is longer than the policy allows
    UNRECEIVED = "unreceived"  # the network fails, or the bytes are no message
    SOURCE = "source"  # the reply names another message or another node than its own
    QUARANTINED = "quarantined"  # the node has offended too often and is not asked
    NOT_FINITE = "not-finite"  # a number is NaN, infinite or too large


@dataclass(frozen=True)
class Rejection:
    """A rejected reply. `reason` is one sentence, which begins with the name of the node."""

    node: str
    code: Code
    reason: str


class Refused(Exception):
    """Raised inside the door to reject a reply. The reason begins in lower case and does not name the node."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def rejection_of_error(node: str, message: Message) -> Rejection:
    """Return the rejection of an error reply."""
    code, reason = message.error.code, str(message.error.reason)
    if code == NODE_UNAVAILABLE:
        return _offline(node, reason[:1000])
    if code == UNREADABLE:
        return Rejection(node, Code.UNRECEIVED, f"{node}: its reply cannot be received: {short(reason)}.")
    if code == FORGED:
        return Rejection(node, Code.SOURCE, f"{node}: its reply is forged: {short(reason)}.")
    return Rejection(node, Code.ERROR, f"{node}: error {code}: {short(reason).removesuffix('.')}.")


@lru_cache(maxsize=1 << 14)  # the same nodes are offline in many rounds
def _offline(node: str, reason: str) -> Rejection:
    return Rejection(node, Code.OFFLINE, f"{node}: error {NODE_UNAVAILABLE}: {short(reason)}.")


def quarantined(node: str, until: int) -> Rejection:
    """Return the verdict on a node that is not asked before round `until`."""
    reason = f"{node}: too many of its replies were rejected; it is asked again in round {until}."
    return Rejection(node, Code.QUARANTINED, reason)


@lru_cache(maxsize=1 << 14)
def not_connected(node: str) -> Rejection:
    """Return the verdict on a known node that was not connected in a round."""
    return Rejection(node, Code.OFFLINE, f"{node}: not connected.")


def rejection_of_exception(node: str, error: Exception) -> Rejection:
    """Return the rejection of a reply whose check raised `error`."""
    if isinstance(error, Refused):
        return Rejection(node, error.code, f"{node}: {error}.")
    # Any other exception comes from the content of the reply, so only this reply is rejected.
    problem = f"{type(error).__name__}: {short(error)}"
    return Rejection(node, Code.RECORDS, f"{node}: its content cannot be read: {problem}.")


def short(value: object) -> str:
    """Return text from a client in a form that is safe for a log: printable, on one line, and of bounded length."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 and text.isprintable() else ascii(text[:200])
