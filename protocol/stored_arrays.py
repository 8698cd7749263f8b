"""The large arrays of replies go to files while they are pulled, so that no reply takes memory, not even a slow one.

Flower pulls an array in chunks, in any order, and holds it three times while it joins them. This is a part of the shim
for Flower's private API; the test of `protocol/flower.py` covers it too.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from importlib import import_module
from threading import Lock
from typing import Any

from flwr.app import ArrayRecord, Message

from corymb.protocol.message_file import StoredArray

log = logging.getLogger("flwr.corymb")
GRID, CLIENT = "flwr.superlink.grid.http_grid", "flwr.supercore.protobuf.client"
AT_ONCE = 4  # chunks of a message that is pushed, each up to 5 MB
CHUNK = b"ArrayChunk "  # how Flower encodes a chunk: this, its children, the length of its body, DIVIDER, its body
DIVIDER = b"\0"
SMALL = 1 << 16  # bytes; a smaller chunk stays in memory
MOST_IN_MEMORY = 1 << 30  # bytes of a reply for which the disk has no room
ALIGNMENT = 64  # bytes, of what lies in the file
NUMBER = struct.Struct("<Q")

Piece = tuple[int, int] | bytes  # a chunk: where it lies in the file, from start to stop, or what it is


def store_pulled_arrays() -> None:
    """Let Flower's grid for deployments put the arrays of the messages that it pulls into files."""
    module = import_module(GRID).__dict__
    pull_objects, push_objects = module["pull_objects"], module["push_objects"]
    inflate, client_class = module["inflate_object_from_contents"], import_module(CLIENT).ProtobufClient
    send = client_class._send

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any) -> dict[str, bytes]:
        contents, once = _Contents(), list(dict.fromkeys(object_ids))  # a site may name an object many times
        try:
            contents.update(pull_objects(once, lambda name: contents.file.keep(pull_object_fn(name)), **options))
        except BaseException:
            contents.file.close()
            raise
        return contents

    def inflate_stored(object_id: str, contents: Mapping[str, bytes]) -> Any:
        message = inflate(object_id, contents)
        if isinstance(contents, _Contents):
            with closing(contents.file):
                _restore(message, contents.file)
        return message

    def push(objects: dict[str, Any], **options: Any) -> None:
        for start in range(0, len(names := list(objects)), AT_ONCE):  # Flower encodes all that it is given at once
            push_objects({name: objects.pop(name) for name in names[start : start + AT_ONCE]}, **options)

    def send_and_release(client: Any, context: Any) -> Any:
        response = send(client, context)
        if response.is_closed:
            response.stream = None  # through it, httpx keeps the response, and so a chunk, in a reference cycle
        return response

    module |= {"pull_objects": pull, "push_objects": push, "inflate_object_from_contents": inflate_stored}
    client_class._send = send_and_release


class ArrayFile:
    """The chunks of one message's arrays, in a file without a name in the folder for temporary files."""

    def __init__(self) -> None:
        self._file: Any = None  # made for the first large chunk
        self._end, self._joined, self._in_memory, self._is_closed = 0, 0, 0, False
        self._pieces: list[Piece] = []
        self._lock = Lock()

    def keep(self, content: bytes) -> bytes:
        """Return `content`, an object of Flower's, unless it is a chunk: then one with the number of its piece.

        Raises `ValueError` if the folder for temporary files is full, and too much of the reply is in memory already.
        """
        if not content.startswith(CHUNK):
            return content
        body = memoryview(content)[content.index(DIVIDER) + 1 :]
        try:
            piece: Piece = bytes(body) if len(body) < SMALL else self._written([body], len(body))
        except OSError as error:
            log.warning("\t│ A reply stays in memory, as the folder for temporary files has no room (%s).", error)
            piece = bytes(body)
            with self._lock:
                self._in_memory += len(body)
            if self._in_memory > MOST_IN_MEMORY:
                raise ValueError(f"A reply of over {MOST_IN_MEMORY} bytes has no room on the disk.") from None
        with self._lock:
            self._pieces.append(piece)
            number = len(self._pieces) - 1
        return CHUNK + b" %d" % NUMBER.size + DIVIDER + NUMBER.pack(number)

    def place(self, numbers: bytes) -> Piece:
        """Return where the array whose pieces have these numbers lies in the file, or its bytes if it is small.

        Raises `ValueError` if a piece comes so often that there is no room: a site may name one a million times.
        """
        pieces: list[Piece] = [self._pieces[number] for (number,) in NUMBER.iter_unpack(numbers)]
        size, received = sum(map(_size, pieces)), sum(map(_size, self._pieces))
        if size < SMALL:
            return b"".join(map(self._read, pieces))
        first, others = pieces[0], pieces[1:]
        if others or isinstance(first, bytes):
            self._joined += size  # of the whole message
            try:
                if self._joined > shutil.disk_usage(tempfile.gettempdir()).free / 2:
                    raise OSError(errno.ENOSPC, "too little free space")
                first = self._written(map(self._read, pieces), size)
            except OSError:  # `keep` has warned of the full disk, or will
                if self._joined > max(received, MOST_IN_MEMORY):
                    raise ValueError(f"A reply repeats its chunks up to {self._joined} bytes: no room.") from None
                return b"".join(map(self._read, pieces))
        return first

    def mapped(self) -> memoryview:
        """Return the whole file, mapped: once for all arrays, because each mapping holds a file descriptor."""
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def close(self) -> None:
        """Close the file; what is mapped from it stays until nobody has it any more.

        A pull that fails leaves its threads behind. They find the file closed, and not another one under its number.
        """
        with self._lock:
            self._is_closed = True
            if self._file is not None:
                self._file.close()

    def _written(self, parts: Iterable[memoryview | bytes], size: int) -> tuple[int, int]:
        """Write `parts`, of `size` bytes together, to the end of the file, and return where they lie."""
        with self._lock:
            if self._is_closed:
                raise ValueError("The pull of this reply has failed.")
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="corymb-reply-")  # noqa: SIM115 - see close
            start = position = self._end
            self._end = -(-(start + size) // ALIGNMENT) * ALIGNMENT
            for part in parts:
                view = memoryview(part)
                while view:
                    count = os.pwrite(self._file.fileno(), view, position)
                    position, view = position + count, view[count:]
            return start, start + size

    def _read(self, piece: Piece) -> bytes:
        return piece if isinstance(piece, bytes) else os.pread(self._file.fileno(), _size(piece), piece[0])


def _size(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]


class _Contents(dict[str, bytes]):
    """The objects of one message, with the file in which its arrays lie."""

    def __init__(self) -> None:
        super().__init__()
        self.file = ArrayFile()


def _restore(message: Message, file: ArrayFile) -> None:
    """Give the arrays of `message`, which have the numbers of their pieces in place of their bytes, these bytes."""
    if not message.has_content():
        return
    records = {id(record): record for record in message.content.values() if isinstance(record, ArrayRecord)}
    arrays = {id(array): array for record in records.values() for array in record.values()}  # equal ones are one object
    places = {number: file.place(array.data) for number, array in arrays.items()}
    whole = file.mapped() if any(isinstance(place, tuple) for place in places.values()) else memoryview(b"")
    stored = {
        number: StoredArray(arrays[number], place if isinstance(place, bytes) else whole[place[0] : place[1]])
        for number, place in places.items()
    }
    for record in records.values():
        for name, array in list(record.items()):
            record[name] = stored[id(array)]
