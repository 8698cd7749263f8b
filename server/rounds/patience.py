"""How long the server tries the same request again while the SuperLink fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from corymb.protocol.temporary import is_temporary

log = logging.getLogger("flwr.corymb")
PATIENCE_SECONDS = 300.0  # for as long, the SuperLink of `corymb serve` waits for a heartbeat
PAUSE_SECONDS = 2.0

T = TypeVar("T")


class Patience:
    """Waits between attempts of one request; `wait` is told of each error."""

    def __init__(self) -> None:
        self._since: float | None = None

    def wait(self, error: Exception) -> None:
        """Wait for the next attempt. Raises `error` if another attempt is of no use, or after `PATIENCE_SECONDS`."""
        if self._since is None:
            self._since = time.monotonic()
            if is_temporary(error):
                log.warning("The SuperLink fails (%s); the server goes on trying.", error)
        if not is_temporary(error) or time.monotonic() - self._since > PATIENCE_SECONDS:
            raise error
        time.sleep(PAUSE_SECONDS)


def patiently(request: Callable[[], T]) -> T:
    """Return what `request` returns, trying again while the SuperLink fails."""
    patience = Patience()
    while True:
        try:
            return request()
        except Exception as error:
            patience.wait(error)
