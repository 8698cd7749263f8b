"""A message in a file. The bytes of its arrays are written as they are, without a second copy in memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict

from corymb.protocol.flower import from_proto, to_proto, with_content

LENGTH = struct.Struct("<Q")
DIGEST = 32  # bytes of the SHA-256 in front


class StoredArray(Array):
    """A Flower Array with the `data` of a mapped file in place of its own. A copy of it has its bytes in memory."""

    def __init__(self, array: Array, data: memoryview | bytes) -> None:
        self.__dict__.update(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, bytes(self.data))


StoredArray.__qualname__ = Array.__qualname__  # Flower writes this name into the encoded record


def write_message(path: Path, message: Message) -> None:
    """Write `message` to `path` atomically, readable for this user only. Raises `OSError` if that fails.

    A power cut may damage the file; `read_message` notices it.
    """
    pieces, digest = to_pieces(message), hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    draft = path.with_name(f"{path.name}.draft")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(digest.digest())
        file.writelines(pieces)
    draft.replace(path)


def read_message(path: Path) -> Message | None:
    """Return the message in `path`; None if the file is damaged. Raises `OSError` if it cannot be read."""
    if path.stat().st_size < DIGEST + LENGTH.size:
        return None
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    digest, data = content[:DIGEST], content[DIGEST:]
    return from_bytes(data) if hashlib.sha256(data).digest() == digest else None


def to_pieces(message: Message) -> list[bytes]:
    """Return `message` as pieces of bytes: lengths, the message without its arrays' bytes, and these."""
    if message.has_error():
        return _with_lengths([to_proto(message)])
    content, data = RecordDict(), []
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            stripped = ArrayRecord()
            for key, array in record.items():
                stripped[key] = Array(array.dtype, array.shape, array.stype, b"")
                data.append(array.data)
            content[name] = stripped
        else:
            content[name] = record
    return _with_lengths([to_proto(with_content(message, content)), *data])


def from_bytes(data: memoryview | bytes) -> Message:
    """Return the message whose pieces, joined, are `data`. The bytes of its arrays are slices of `data`."""
    head, *arrays = _pieces(data)
    message = from_proto(bytes(head))
    if not message.has_error():
        remaining = iter(arrays)
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                for name, array in record.items():
                    record[name] = StoredArray(array, next(remaining))
    return message


def _with_lengths(pieces: list[bytes]) -> list[bytes]:
    return [LENGTH.pack(len(pieces)), *(LENGTH.pack(len(piece)) for piece in pieces), *pieces]


def _pieces(data: memoryview | bytes) -> Iterator[memoryview | bytes]:
    (count,) = LENGTH.unpack_from(data)
    start = LENGTH.size * (count + 1)
    for index in range(count):
        (length,) = LENGTH.unpack_from(data, LENGTH.size * (index + 1))
        yield data[start : start + length]
        start += length
