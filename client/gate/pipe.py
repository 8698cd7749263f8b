"""What the gate and the process of an app say to each other, over a socket: a line of JSON, then bytes."""

from __future__ import annotations

import json
import socket
from math import inf
from typing import Any, BinaryIO, cast

LONGEST_LINE = 1 << 20  # bytes of a header


class Pipe:
    """One end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = cast(BinaryIO, connection.makefile("rb"))

    def send(self, header: dict[str, Any], **parts: list[bytes]) -> None:
        """Send `header`, and for each name in `parts` the bytes that its pieces make together."""
        lengths = {name: sum(map(len, pieces)) for name, pieces in parts.items()}
        self._connection.sendall(json.dumps({**header, "lengths": lengths}).encode() + b"\n")
        for pieces in parts.values():
            for piece in pieces:
                self._connection.sendall(piece)

    def receive(self, most_bytes: float = inf) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the next header and its parts. Raises `EOFError` if the other end is gone.

        Raises `ValueError` if the other end sends more than about `most_bytes`, or something else.
        """
        line = self._file.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise EOFError("The other process has ended.")
        header: dict[str, Any] = json.loads(line)
        lengths = header["lengths"]
        if not isinstance(lengths, dict) or not all(isinstance(n, int) and n >= 0 for n in lengths.values()):
            raise ValueError("The other process does not say how much it sends.")
        if sum(lengths.values()) > most_bytes + LONGEST_LINE:
            raise ValueError(f"The other process sends more than {most_bytes:g} bytes.")
        return header, {name: self._exactly(length) for name, length in lengths.items()}

    def close(self) -> None:
        """Close this end. Other processes that have it open keep it."""
        self._file.close()
        self._connection.close()

    def _exactly(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise EOFError("The other process has ended.")
        return data
