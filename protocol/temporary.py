"""Which errors of the SuperLink, or of a proxy in front of it, may be gone a moment later."""

from __future__ import annotations

import httpx

TIMEOUT, TOO_MANY = 408, 429  # HTTP codes below 500 that say: later


def is_temporary(error: Exception) -> bool:
    """Return whether the same request may succeed a moment later: no connection, or an answer such as 500 or 429.

    A SuperLink answers 500 while the disk of its database is full.
    """
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        return code >= 500 or code in (TIMEOUT, TOO_MANY)
    return isinstance(error, httpx.TransportError)
