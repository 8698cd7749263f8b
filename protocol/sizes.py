"""The number of bytes that a message's arrays take on their way."""

from __future__ import annotations

from math import prod

from flwr.app import ArrayRecord, Message, RecordDict

from corymb.protocol.codec import DTYPES, Array
from corymb.protocol.records import of_kind

HEADER = 128  # bytes of an .npy header


def bytes_in(content: RecordDict) -> int:
    """Return the bytes of all arrays in `content`; nothing is encoded for it."""
    return sum(_bytes_of(array) for record in of_kind(content, ArrayRecord) for array in record.values())


def bytes_of(message: Message) -> int:
    """Return the bytes of all arrays in `message`; 0 for an error."""
    return 0 if message.has_error() else bytes_in(message.content)


def _bytes_of(array: object) -> int:
    if isinstance(array, Array) and array.dtype in DTYPES:
        return prod(array.shape) * DTYPES[array.dtype].itemsize + HEADER
    return len(getattr(array, "data", b""))
