"""A TCP proxy that delays what it forwards, because some kernels have no netem."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

Address = tuple[str, int]


class DelayingProxy:
    """Listens at `address` and forwards to `target`, `seconds` later in each direction. A context manager."""

    def __init__(self, address: Address, target: Address, seconds: float) -> None:
        self._address, self._target, self._seconds = address, target, seconds
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> DelayingProxy:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, *self._address), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        ways: list[Coroutine[Any, Any, None]] = [self._forward(reader, back), self._forward(there, writer)]
        await asyncio.gather(*ways, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self._loop.call_later(self._seconds, writer.write, data)
        self._loop.call_later(self._seconds, writer.close)
