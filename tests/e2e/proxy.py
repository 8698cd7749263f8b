"""A TCP proxy between the sites and the SuperLink that answers pushes with errors, cuts them, or slows them down."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from contextlib import suppress

from corymb.tests.e2e.processes import free_port

PUSH = b"POST /v1/fleet/push-messages"
PIECE = 1 << 14
CUT = 0  # in place of an HTTP status: the connection is closed


class Proxy:
    """Forwards connections to `target`. Each entry of `faults` is the HTTP status with which one push is answered.

    With `slow_after` bytes in one direction from a site, the rest of its connection passes at `rate` bytes a second.
    """

    def __init__(self, target: int) -> None:
        self.port, self.target = free_port(), target
        self.faults: deque[int] = deque()
        self.injected: list[int] = []
        self.slow_site_rate: float | None = None  # bytes per second, of the first connection that sends much
        self._has_slow = False
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                site, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(site,), daemon=True).start()

    def _serve(self, site: socket.socket) -> None:
        with suppress(OSError), site, socket.create_connection(("127.0.0.1", self.target)) as link:
            threading.Thread(target=self._pass, args=(link, site), daemon=True).start()
            sent, is_slow = 0, False
            while data := site.recv(PIECE):
                if data.startswith(PUSH) and self.faults:
                    status = self.faults.popleft()
                    self.injected.append(status)
                    if status != CUT:
                        site.sendall(
                            f"HTTP/1.1 {status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                        )
                    return
                sent += len(data)
                if self.slow_site_rate is not None and sent > 1 << 18:
                    if not self._has_slow:
                        self._has_slow = is_slow = True
                    if is_slow:
                        time.sleep(len(data) / self.slow_site_rate)
                link.sendall(data)

    def _pass(self, link: socket.socket, site: socket.socket) -> None:
        with suppress(OSError):
            while data := link.recv(PIECE):
                site.sendall(data)
        with suppress(OSError):
            site.shutdown(socket.SHUT_RDWR)
