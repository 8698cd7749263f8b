"""What the gate and the process of an app say to each other, over a socket: a line of JSON, then bytes."""

from __future__ import annotations

import json
import socket
from typing import Any, BinaryIO, cast


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

    def receive(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the next header and its parts. Raises `EOFError` if the other end is gone."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("The other process has ended.")
        header: dict[str, Any] = json.loads(line)
        return header, {name: self._exactly(length) for name, length in header.pop("lengths").items()}

    def close(self) -> None:
        """Close this end. Other processes that have it open keep it."""
        self._file.close()
        self._connection.close()

    def settimeout(self, seconds: float | None) -> None:
        """Set after how many seconds `send` and `receive` raise `TimeoutError`; None: never."""
        self._connection.settimeout(seconds)

    def _exactly(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise EOFError("The other process has ended.")
        return data
